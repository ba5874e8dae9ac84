from .evaluate import evaluate as evaluate
from .likelihood import TargetLikelihood as TargetLikelihood
from .likelihood import classify_rows as classify_rows
from .likelihood import target_likelihood as target_likelihood
from .report import Report as Report
