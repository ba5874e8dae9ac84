"""The plain path: one padded batch through the model's own forward.

It runs any model transformers can run, and row by row it is the oracle the faster paths are held
to. Models that padding disturbs (RWKV, RecurrentGemma) are found by a probe and run row by row.
Rows are padded on the left, so the targets of all rows end in the last columns and the
head runs on those alone (``logits_to_keep``).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import Facts, decoder_embedding, facts_of, locked, virtual_rows
from softprompt.engine.context import check_rows, depends_on_neighbours
from softprompt.engine.layout import Layout, Prompts
from softprompt.engine.predictions import IGNORED, HeadInput, PredictingEngine, Predictions
from softprompt.engine.prefixes.paths import prefix_path, prefixed
from softprompt.engine.prefixes.values import Prefixes
from softprompt.engine.rows import EngineRow, is_keys_and_values
from softprompt.engine.selfcheck import difference
from softprompt.errors import ConfigError

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
        check_rows(self._model, self._facts, rows, prompts, sees_input=self._sees_input)
        if len(rows) > 1 and (
            depends_on_neighbours(rows, prompts, self._facts)
            or self.why_alone()
            or self._prefix_counts_columns(rows, prompts)
        ):
            return Predictions.joined([self.predict([row], prompts, head) for row in rows])
        run = self._encoder_decoder if self._facts.is_encoder_decoder else self._causal
        return run(rows, prompts, head)

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

    def _prefix_counts_columns(self, rows: Sequence[EngineRow], prompts: Sequence[Tensor]) -> bool:
        """Tell whether the padding before a row would count between its prefix and its text."""
        if _prefixes(rows, prompts) is None:
            return False
        return prefix_path(self._model, self._facts).counts_columns

    def _causal(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None
    ) -> Predictions:
        ids, mask = self._padded([row.source + row.target for row in rows], left=True)
        chosen = _before_the_input(rows, prompts)
        layout = Layout.of(mask, chosen)
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
        with self._behind(rows, prompts), _lent(self._model, chosen):
            logits = self._model(**inputs).logits[:, ends]  # [B, longest, V]
        hidden = head.states[:, ends] if head is not None and head.states is not None else None
        return Predictions.of_columns(logits, hidden, self._labels(rows, longest, left=True))

    def _encoder_decoder(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None
    ) -> Predictions:
        ids, mask = self._padded([row.source for row in rows], left=False)
        chosen = _before_the_input(rows, prompts)
        layout = Layout.of(mask, chosen, compact=True)
        with _lent(self._model, chosen):
            states = self._model.get_encoder()(
                input_ids=layout.ids(ids, self._facts.vocabulary, self._facts.pad_id),
                attention_mask=layout.mask
                if self._sees_input
                else layout.isolated(self._model.dtype),
            )
        inputs = {"encoder_outputs": states, "attention_mask": layout.mask, "use_cache": False}
        labels = self._labels(rows, max(len(row.target) for row in rows), left=False)
        chosen = Prompts.of(prompts, _of_rows(prompts, [row.decoder_prompt for row in rows]))
        if chosen.width:
            # Padding is behind: a decoder looks back, so it needs no mask.
            layout = Layout.of((labels != IGNORED).long(), chosen, compact=True)
            first = int(decoder_embedding(self._model).weight.shape[0])
            inputs["decoder_input_ids"] = layout.ids(
                self._shifted(labels), first, self._facts.pad_id
            )
            labels = layout.spread(labels, IGNORED)
        else:
            inputs["labels"] = labels
        with self._behind(rows, prompts), _lent(self._model, chosen, decoder=True):
            logits = self._model(**inputs).logits
        return Predictions.of_columns(logits, head.states if head else None, labels)

    def _behind(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor]
    ) -> AbstractContextManager[None]:
        prefixes = _prefixes(rows, prompts)
        return nullcontext() if prefixes is None else prefixed(self._model, self._facts, prefixes)

    def _shifted(self, labels: Tensor) -> Tensor:
        """Return the decoder's own ids for labels ``[B, T]``.

        Raises:
            ConfigError: If the model does not say how it makes them.
        """
        shift = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ConfigError(
                f"{self._facts.architecture} does not say how its decoder starts, so no prompt can "
                "stand there; use output_model_types ['ENCODER']"
            )
        return cast(Tensor, shift(labels=labels))

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


def _before_the_input(rows: Sequence[EngineRow], prompts: Sequence[Tensor]) -> Prompts:
    chosen = _of_rows(prompts, [row.prompt for row in rows])
    return Prompts.of(prompts, chosen, at=[row.at for row in rows])


def _of_rows(prompts: Sequence[Tensor], choice: Sequence[int]) -> list[int]:
    """Return the same choice of prompts, -1 where it is keys and values."""
    return [-1 if c >= 0 and is_keys_and_values(prompts[c]) else c for c in choice]


def _prefixes(rows: Sequence[EngineRow], prompts: Sequence[Tensor]) -> Prefixes | None:
    """Return the rows' keys and values; in a seq2seq model they stand in the decoder either way."""
    first = Prefixes.of(prompts, [row.prompt for row in rows])
    return first or Prefixes.of(prompts, [row.decoder_prompt for row in rows])


def _lent(
    model: PreTrainedModel, prompts: Prompts, *, decoder: bool = False
) -> AbstractContextManager[Any]:
    if not prompts.width:
        return locked(model)
    return virtual_rows(model, prompts.table, decoder=decoder)


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
