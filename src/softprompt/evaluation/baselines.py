"""What a tuned prompt is compared with: its base with a hand-written prompt, demonstrations, or nothing.

A hand-written text is a soft prompt that nobody trained: its virtual tokens are the embeddings of the text's
tokens. So whatever runs prompts runs it, and computes it once for a batch.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts import Manifest, Origin, manifest_of
from softprompt.backbone import Base, freeze, load_base
from softprompt.data import INPUT, DataSource, Record, encode, label_set, read_records
from softprompt.errors import ConfigError, DataError, line
from softprompt.evaluation import EvaluationSettings, Numbered
from softprompt.inference import Ensemble, TunedPrompt, row_tokenizer, written
from softprompt.progress import timed

Answering: TypeAlias = TunedPrompt | Ensemble
"""What answers records."""

logger = logging.getLogger(__name__)

_BETWEEN = "\n\n"
"""What stands behind the instruction, and behind each demonstration."""

_KINDS = ("generation", "classification")


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A base without a tuned prompt: zero-shot, with a hand-written text, with demonstrations, or with both.

    What is None is that of the prompt it is compared with, as far as there is one.

    Attributes:
        base_model: Folder, GGUF file, Hub id, ``"demo"``, or a model in memory.
        template: Template of the input, as ``verbalizer`` of ``tune``.
        instruction: Text that stands before the input, or in the system turn of a chat.
        few_shot: Demonstrations (K), drawn from ``examples`` with ``seed``, balanced over their labels.
        examples: Records for demonstrations; those that are evaluated too are left out.
        seed: Seed of the draw and of the order.
        labels: Label set; by default that of the prompt, or of the data where its targets look like labels.
        chat: Put the input into the user turn of the base's chat template; chats, where there is no template, as
            they are.
        max_source_length: Maximum input length, in tokens; 256 without a prompt.
        max_target_length: Maximum target length, in tokens; 128 without a prompt.
        tokenizer: Tokenizer of ``base_model``, where it is not beside it.
        torch_dtype: Data type of ``base_model``.
        device: Device of ``base_model``, such as "cuda:0".
        shard: How ``base_model`` is spread over processes, "fsdp" or "tp".
    """

    base_model: str | Path | PreTrainedModel | None = None
    template: str | None = None
    instruction: str | None = None
    few_shot: int = 0
    examples: DataSource | None = None
    seed: int = 0
    labels: Sequence[str] | None = None
    chat: bool = False
    max_source_length: int | None = None
    max_target_length: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    torch_dtype: str | torch.dtype | None = None
    device: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        """Refuse what would be ignored or is missing.

        Raises:
            ConfigError: Demonstrations without records to draw from, or the other way round, or an empty text.
        """
        if self.few_shot < 0 or (self.few_shot > 0) != (self.examples is not None):
            raise ConfigError(
                f"few_shot draws at least 1 demonstration from examples, got {self.few_shot} "
                f"{'without' if self.examples is None else 'with'} examples; give both, or neither"
            )
        if self.instruction is not None and not self.instruction.strip():
            raise ConfigError("the instruction is empty; write a text, or leave it out")

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = ["instruction"] if self.instruction else []
        parts += [f"{self.few_shot}-shot"] if self.few_shot else []
        return " + ".join(parts) or "zero-shot"


def prompted(
    subject: Answering | Baseline,
    numbered: Sequence[Numbered],
    how: EvaluationSettings,
    like: TunedPrompt | None = None,
) -> tuple[Answering, EvaluationSettings]:
    """Return a baseline as a prompt, and how to evaluate it: without that prompt where it has no text.

    Args:
        subject: What to make; others than baselines are returned as they are.
        numbered: The records of the data.
        how: How the prompt that it is compared with is evaluated.
        like: That prompt, if there is one.

    Raises:
        ConfigError: There is neither a base nor a prompt that has one, or the base has no such chat template.
        DataError: There are not enough records to draw demonstrations from.
    """
    if not isinstance(subject, Baseline):
        return subject, how
    baseline, records = subject, [each.record for each in numbered]
    pool = [] if baseline.examples is None else _pool(baseline.examples, records, how)
    base, manifest = _frame(baseline, [*records, *pool], how, like)
    if manifest.chat and baseline.few_shot:
        raise ConfigError("few_shot fills in a template, these inputs are chats; show examples in the instruction")
    rows = row_tokenizer(base.tokenizer, replace(manifest, chat=False))
    parts = [rows.demonstration(record) for record in _drawn(pool, baseline)]
    if baseline.instruction is not None:
        parts[:0] = encode(base.tokenizer, [baseline.instruction.strip()], special=False, marks_are_text=True)
    between = rows.text(_BETWEEN)
    ids = [token for part in parts for token in (*part, *between)]
    chat = baseline.chat or manifest.chat or (like is not None and like.rows.placement == "chat_system")
    if chat and ids:  # the template ends the system turn itself
        ids = ids[: len(ids) - len(between)]
    return written(base, manifest, ids, chat=chat), replace(how, without_prompt=not ids, baseline=baseline.name)


def _frame(
    baseline: Baseline, records: Sequence[Record], how: EvaluationSettings, like: TunedPrompt | None
) -> tuple[Base, Manifest]:
    """Return the base of a baseline, and what its inputs and answers are like."""
    if like is not None and baseline.base_model is None:
        base = like.base
    elif baseline.base_model is None:
        raise ConfigError("a baseline without a prompt needs a base: name it in base_model (--base-model)")
    else:
        told = ("tokenizer", "torch_dtype", "device", "shard")
        reading: dict[str, Any] = {name: getattr(baseline, name) for name in told}
        with timed(silent=how.silent):
            base = load_base(baseline.base_model, **reading)
        freeze(base.model)
    manifest = manifest_of(Origin.of_base(base), None) if like is None else like.manifest
    labels = None if baseline.labels is None else tuple(baseline.labels)
    if like is None and labels is None:
        labels = label_set([str(record.target) for record in records], task=how.task)
        logger.info("labels: %s", "none, texts are generated" if labels is None else line(", ".join(labels)))
    chats = baseline.template is None and all(each.chat for each in records)
    only = chats and not any(
        {INPUT, "instruction"} & {*each.fields} for each in records
    )  # no template can show them
    if like is None and only and not baseline.chat:
        logger.info("the base's chat template renders the records")
    elif like is None and chats and not baseline.chat and base.tokenizer.chat_template:
        logger.info("the records fill in the template; with chat (--chat) the base's own renders them, as in tune")
    given: dict[str, Any] = {
        "template": baseline.template,
        "labels": labels,
        "task": None if like is not None and baseline.labels is None else _KINDS[labels is not None],
        "chat": (chats and (baseline.chat or (like is None and only))) or None,
        "max_source_length": baseline.max_source_length,
        "max_target_length": baseline.max_target_length,
    }
    return base, replace(manifest, **{name: value for name, value in given.items() if value is not None})


def _pool(examples: DataSource, records: Sequence[Record], how: EvaluationSettings) -> list[Record]:
    """Return the records to draw demonstrations from: none that shows the answer to a record that is evaluated."""
    found = read_records(
        examples,
        input_field=how.input_field,
        output_field=how.target_field,
        label_names=how.label_names,
        use="train",
    )
    evaluated = {frozenset(record.fields.items()) for record in records}
    kept = [record for record in found if frozenset(record.fields.items()) not in evaluated]
    if len(kept) < len(found):
        logger.warning(
            "%s of %s examples are among the records that are evaluated, and are not shown as demonstrations",
            f"{len(found) - len(kept):,}",
            f"{len(found):,}",
        )
    return kept


def _drawn(pool: Sequence[Record], baseline: Baseline) -> list[Record]:
    """Return K records in random order, as many of each target as of any other, as far as there are so many.

    Raises:
        DataError: There are fewer than K.
    """
    if len(pool) < baseline.few_shot:
        raise DataError(
            f"few_shot {baseline.few_shot} needs as many examples, there are {len(pool):,} that are not evaluated; "
            "give more, or lower it (--few-shot)"
        )
    draw = random.Random(baseline.seed)
    shuffled = draw.sample(pool, len(pool))
    taken = Counter[str | None]()
    turns: list[tuple[int, int, Record]] = []
    for record in shuffled:
        turns.append((taken[record.target], len(turns), record))
        taken[record.target] += 1
    chosen = [record for *_, record in sorted(turns, key=lambda turn: turn[:2])][: baseline.few_shot]
    return draw.sample(chosen, len(chosen))
