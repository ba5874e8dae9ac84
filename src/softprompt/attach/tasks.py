"""What differs between task types, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from softprompt.errors import ConfigError
from softprompt.prompts import TaskType

IGNORED = -100
"""Label of a column that no loss reads, transformers' convention."""


@dataclass(frozen=True, slots=True)
class TaskRules:
    """How one task type treats the extra columns.

    Attributes:
        suffix: End of the class name of such models in transformers.
        token_labels: Whether ``labels`` hold one value per token, so the prompt gets -100.
        next_token: Whether a label is predicted by the column before it.
        pooled: Whether one place of a row decides its output: the last real one in decoders, the first
            column in encoders, where every row therefore starts.
        span_labels: Whether ``start_positions`` / ``end_positions`` count columns, so they move by P.
        packs: Whether nothing reads an output where the input is padded, so that encoders may run
            without padding; a softmax over the columns (spans) does.
        heads: Modules that are new for the task, trained and saved with the prompt.
    """

    suffix: str
    token_labels: bool = False
    next_token: bool = False
    pooled: bool = False
    span_labels: bool = False
    packs: bool = False
    heads: tuple[str, ...] = ()


RULES: Mapping[TaskType, TaskRules] = {
    TaskType.CAUSAL_LM: TaskRules("ForCausalLM", token_labels=True, next_token=True),
    TaskType.SEQ_2_SEQ_LM: TaskRules("ForConditionalGeneration"),
    TaskType.SEQ_CLS: TaskRules(
        "ForSequenceClassification", pooled=True, packs=True, heads=("classifier", "score")
    ),
    TaskType.TOKEN_CLS: TaskRules(
        "ForTokenClassification", token_labels=True, packs=True, heads=("classifier", "score")
    ),
    TaskType.QUESTION_ANS: TaskRules(
        "ForQuestionAnswering", span_labels=True, heads=("qa_outputs",)
    ),
    TaskType.FEATURE_EXTRACTION: TaskRules("Model", packs=True),
}


def infer_task(model: PreTrainedModel) -> TaskType:
    """Read the task type from the model's class name.

    Raises:
        ConfigError: If the name says nothing.
    """
    name = type(model).__name__.replace("LMHeadModel", "ForCausalLM")
    for task, rules in RULES.items():
        if name.endswith(rules.suffix):
            return task
    raise ConfigError(
        f"task_type is missing and {name} does not tell it; set task_type to one of {', '.join(RULES)}"
    )
