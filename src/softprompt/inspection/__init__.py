"""What was learned: numbers first, figures from them."""

from __future__ import annotations

from softprompt.inspection.describe import PromptGeometry, PromptSummary, describe
from softprompt.inspection.figures import training_curve
from softprompt.inspection.neighbours import NearToken

__all__ = ["NearToken", "PromptGeometry", "PromptSummary", "describe", "training_curve"]
