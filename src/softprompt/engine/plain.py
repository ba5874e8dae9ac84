"""The plain path: one padded batch through the model's own forward.

It runs any model transformers can run, and row by row it is the oracle the faster paths are held
to. Models that padding disturbs (RWKV, RecurrentGemma) are found by a probe and run row by row.
Rows are padded on the left, so the targets of all rows end in the last columns and the
head runs on those alone (``logits_to_keep``).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone.facts import (
    Facts,
    facts_of,
    output_limit,
)
from softprompt.engine.context import check_rows, check_table, depends_on_neighbours
from softprompt.engine.layout import Layout, Prompts
from softprompt.engine.predictions import IGNORED, HeadInput, PredictingEngine, Predictions
from softprompt.engine.rows import EngineRow
from softprompt.engine.selfcheck import difference
from softprompt.engine.virtual import virtual_rows

_alone: WeakKeyDictionary[PreTrainedModel, dict[bool, str]] = WeakKeyDictionary()


@final
class PlainEngine(PredictingEngine):
    """Scores targets with one padded forward pass a batch."""

    name = "plain"

    def __init__(
        self, model: PreTrainedModel, *, prompt_sees_input: bool = True, trusted: bool = False
    ) -> None:
        """Prepare for a model; ``trusted`` skips the probe for models that padding disturbs."""
        self._trusted = trusted
        self._model = model
        self._sees_input = prompt_sees_input
        self._facts: Facts = facts_of(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def predict(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None = None
    ) -> Predictions:
        """Run the rows; see ``PredictingEngine``.

        Raises:
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        check_table(self._model, self._facts)
        check_rows(rows, prompts, self._facts, output_limit(self._model))
        if len(rows) > 1 and (
            depends_on_neighbours(rows, prompts, self._facts) or self.why_alone()
        ):
            return Predictions.joined([self.predict([row], prompts, head) for row in rows])
        chosen = Prompts.of(prompts, [row.prompt for row in rows])
        run = self._encoder_decoder if self._facts.is_encoder_decoder else self._causal
        with virtual_rows(self._model, chosen.table if chosen.table.numel() else None):
            return run(rows, chosen, head)

    def why_alone(self) -> str:
        """Return why rows are run one at a time, empty when they are batched; remembered per model."""
        if self._trusted:
            return ""
        known = _alone.setdefault(self._model, {})
        if self._sees_input not in known:
            batched = PlainEngine(self._model, prompt_sees_input=self._sees_input, trusted=True)
            try:
                problem = difference(batched, batched, self._model)
            except Exception:
                problem = None
            known[self._sees_input] = problem or ""
        return known[self._sees_input]

    def _causal(
        self, rows: Sequence[EngineRow], prompts: Prompts, head: HeadInput | None
    ) -> Predictions:
        ids, mask = self._padded([row.source + row.target for row in rows], left=True)
        layout = Layout.of(mask, prompts)
        inputs: dict[str, Any] = {
            "input_ids": layout.ids(ids, self._facts.vocabulary, self._facts.pad_id),
            "attention_mask": layout.mask,
            "use_cache": False,
        }
        if self._facts.accepts_position_ids and not self._facts.positions_from_ids:
            inputs["position_ids"] = layout.positions()
        longest = max(len(row.target) for row in rows)
        if self._keeps_logits:
            inputs["logits_to_keep"] = longest + 1
        ends = slice(-(longest + 1), -1)
        logits = self._model(**inputs).logits[:, ends]  # [B, longest, V]
        hidden = head.states[:, ends] if head is not None and head.states is not None else None
        return Predictions.of_columns(logits, hidden, self._labels(rows, longest, left=True))

    def _encoder_decoder(
        self, rows: Sequence[EngineRow], prompts: Prompts, head: HeadInput | None
    ) -> Predictions:
        ids, mask = self._padded([row.source for row in rows], left=False)
        layout = Layout.of(mask, prompts, compact=True)
        labels = self._labels(rows, max(len(row.target) for row in rows), left=False)
        states = self._model.get_encoder()(
            input_ids=layout.ids(ids, self._facts.vocabulary, self._facts.pad_id),
            attention_mask=layout.mask if self._sees_input else layout.isolated(self._model.dtype),
        )
        output = self._model(
            encoder_outputs=states, attention_mask=layout.mask, labels=labels, use_cache=False
        )
        return Predictions.of_columns(output.logits, head.states if head else None, labels)

    def _padded(self, sequences: Sequence[tuple[int, ...]], *, left: bool) -> tuple[Tensor, Tensor]:
        ids, mask = pad_rows(sequences, left=left, pad_id=self._facts.pad_id)
        return ids.to(self._model.device), mask.to(self._model.device)

    def _labels(self, rows: Sequence[EngineRow], width: int, *, left: bool) -> Tensor:
        """Return target ids ``[B, width]``, -100 where a row has none."""
        labels = torch.full((len(rows), width), IGNORED)
        for i, row in enumerate(rows):
            where = slice(width - len(row.target), width) if left else slice(0, len(row.target))
            labels[i, where] = torch.tensor(row.target, dtype=torch.long)
        return labels.to(self._model.device)


def pad_rows(
    sequences: Sequence[tuple[int, ...]], *, left: bool, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[B, T]``, padded on one side to the longest row."""
    total = max(1, *(len(sequence) for sequence in sequences))
    ids = torch.full((len(sequences), total), pad_id)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        where = slice(total - len(sequence), total) if left else slice(0, len(sequence))
        ids[i, where] = torch.tensor(sequence, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask
