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

import torch
from torch import Tensor

from softprompt.backbone import Base, decoder_embedding
from softprompt.engine.layout import Layout, pad_rows
from softprompt.engine.predictions import (
    IGNORED,
    Engine,
    HeadInput,
    Predictions,
    see_input,
)
from softprompt.engine.prefixes import prefix_path, prefixed
from softprompt.engine.probe import remembered, scoring_difference
from softprompt.engine.prompt_table import Prefixes, PromptTable
from softprompt.engine.rows import EngineRow, depends_on_neighbours
from softprompt.errors import ConfigError


@final
class PlainEngine(Engine):
    """Scores targets with one padded forward pass a batch."""

    name = "plain"

    def __init__(self, base: Base, *, trusted: bool = False) -> None:
        """Prepare for a base; ``trusted`` skips the probe for models that padding disturbs."""
        super().__init__(base)
        self._trusted = trusted
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``."""
        prefixes = Prefixes.of([row.prompt for row in rows])
        if len(rows) > 1 and (
            depends_on_neighbours(rows, self._facts)
            or self.why_alone(see_input(rows))
            # Padding before a row would count between its prefix and its text.
            or (prefixes is not None and prefix_path(self._base).counts_columns)
        ):
            alone = [self.run_alike([row], head) for row in rows]
            return Predictions.joined(alone, [[i] for i in range(len(rows))])
        run = self._encoder_decoder if self._facts.is_encoder_decoder else self._causal
        return run(rows, prefixes, head)

    def why_alone(self, sees_input: bool = True) -> str:
        """Return why rows are run one at a time, empty when they are batched; remembered per model.

        Args:
            sees_input: Whether an encoder's prompts attend to the input.
        """
        if self._trusted:
            return ""
        return remembered(
            self._base,
            f"padded rows, prompts that {'' if sees_input else 'do not '}see the input",
            lambda: self._disturbed(sees_input),
        )

    def _disturbed(self, sees_input: bool) -> str:
        """Return how padding changes a row, empty where it does not."""
        batched = PlainEngine(self._base, trusted=True)
        try:
            return scoring_difference(batched, batched, self._base, sees_input=sees_input)
        except (
            Exception
        ):  # a model that raises does so for its caller too, one row at a time or not
            return ""

    def _causal(
        self, rows: Sequence[EngineRow], prefixes: Prefixes | None, head: HeadInput | None
    ) -> Predictions:
        ids, mask = self._padded([row.source + row.target for row in rows], left=True)
        prompts = PromptTable.of([row.prompt for row in rows], at=[row.at for row in rows])
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
        with self._behind(prefixes), prompts.injected(self._base):
            logits = self._base.model(**inputs).logits[:, ends]  # [B, longest, V]
        hidden = head.states[:, ends] if head is not None and head.states is not None else None
        return Predictions.of_columns(logits, hidden, self._labels(rows, longest, left=True))

    def _encoder_decoder(
        self, rows: Sequence[EngineRow], prefixes: Prefixes | None, head: HeadInput | None
    ) -> Predictions:
        ids, mask = self._padded([row.source for row in rows], left=False)
        prompts = PromptTable.of([row.prompt for row in rows], at=[row.at for row in rows])
        layout = Layout.of(mask, prompts, compact=True)
        seen = layout.mask if prompts.sees_input else layout.isolated(self._base.model.dtype)
        with prompts.injected(self._base):
            states = self._base.model.get_encoder()(
                input_ids=layout.ids(ids, self._facts.vocabulary, self._facts.pad_id),
                attention_mask=seen,
            )
        inputs = {"encoder_outputs": states, "attention_mask": layout.mask, "use_cache": False}
        labels = self._labels(rows, max(len(row.target) for row in rows), left=False)
        before = PromptTable.of([row.prompt for row in rows], "decoder")
        if before.width:
            # Padding is behind: a decoder looks back, so it needs no mask.
            layout = Layout.of((labels != IGNORED).long(), before, compact=True)
            first = int(decoder_embedding(self._base.model).weight.shape[0])
            inputs["decoder_input_ids"] = layout.ids(
                self._shifted(labels), first, self._facts.pad_id
            )
            labels = layout.spread(labels, IGNORED)
        else:
            inputs["labels"] = labels
        with self._behind(prefixes), before.injected(self._base, decoder=True):
            logits = self._base.model(**inputs).logits
        return Predictions.of_columns(logits, head.states if head else None, labels)

    def _behind(self, prefixes: Prefixes | None) -> AbstractContextManager[None]:
        return nullcontext() if prefixes is None else prefixed(self._base, prefixes)

    def _shifted(self, labels: Tensor) -> Tensor:
        """Return the decoder's own ids for labels ``[B, T]``.

        Raises:
            ConfigError: If the model does not say how it makes them.
        """
        shift = getattr(self._base.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ConfigError(
                f"{self._facts.architecture} does not say how its decoder starts, so no prompt can "
                "stand there; use output_model_types ['ENCODER']"
            )
        return cast(Tensor, shift(labels=labels))

    def _padded(self, sequences: Sequence[tuple[int, ...]], *, left: bool) -> tuple[Tensor, Tensor]:
        ids, mask = pad_rows(sequences, left=left, pad_id=self._facts.pad_id)
        return ids.to(self._base.model.device), mask.to(self._base.model.device)

    def _labels(self, rows: Sequence[EngineRow], width: int, *, left: bool) -> Tensor:
        """Return target ids ``[B, width]``, -100 where a row has none."""
        labels = torch.full((len(rows), width), IGNORED)
        for i, row in enumerate(rows):
            where = slice(width - len(row.target), width) if left else slice(0, len(row.target))
            labels[i, where] = torch.tensor(row.target, dtype=torch.long)
        return labels.to(self._base.model.device)
