from .baselines import Baseline as Baseline
from .compare import Comparison as Comparison
from .compare import compare as compare
from .evaluate import evaluate as evaluate
from .report import Report as Report
from .report import table as table
