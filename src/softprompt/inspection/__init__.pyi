from .describe import PromptSummary as PromptSummary
from .describe import describe as describe
from .figures import training_curve as training_curve
from .retrieval import Retrieval as Retrieval
from .retrieval import similar_prompts as similar_prompts
