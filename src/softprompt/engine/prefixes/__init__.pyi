from .passes import gathered_gradient as gathered_gradient
from .passes import own_passes as own_passes
from .paths import prefix_path as prefix_path
from .paths import prefixed as prefixed
