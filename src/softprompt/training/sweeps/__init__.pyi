from .space import SweepSettings as SweepSettings
from .sweep import Sweep as Sweep
from .sweep import sweep as sweep
