from .retrieval import Retrieval as Retrieval
from .retrieval import similar_prompts as similar_prompts
from .summary import PromptSummary as PromptSummary
from .summary import describe as describe
