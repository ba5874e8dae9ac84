from .evaluate import evaluate as evaluate
from .report import Report as Report
