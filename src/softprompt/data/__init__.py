"""Text to rows to batches: files, records, the verbalizer, tokens, length-aware planning."""

from softprompt.data.batches import plan_batches
from softprompt.data.labels import label_set
from softprompt.data.records import Example, Rows, data_fingerprint, read_examples
from softprompt.data.template import Verbalizer
from softprompt.data.tokens import CutSummary, RowTokenizer, TokenRow

__all__ = [
    "CutSummary",
    "Example",
    "RowTokenizer",
    "Rows",
    "TokenRow",
    "Verbalizer",
    "data_fingerprint",
    "label_set",
    "plan_batches",
    "read_examples",
]
