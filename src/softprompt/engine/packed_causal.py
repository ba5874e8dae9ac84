"""The forest path of causal models: one packed row of real tokens, logits where a target is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone.facts import facts_of
from softprompt.engine.attention import ForestUnsupportedError, forest_attention
from softprompt.engine.context import check_rows, check_table, depends_on_neighbours
from softprompt.engine.forest import Forest
from softprompt.engine.plain import PlainEngine
from softprompt.engine.predictions import HeadInput, PredictingEngine, Predictions
from softprompt.engine.rows import EngineRow
from softprompt.engine.virtual import virtual_rows
from softprompt.engine.visibility import visibility_of


@final
class ForestEngine(PredictingEngine):
    """Scores targets over a forest; exact, with no padding in token-wise layers."""

    name = "forest"

    def __init__(self, model: PreTrainedModel) -> None:
        """Prepare for a model.

        Raises:
            ForestUnsupportedError: If the model cannot take a packed row.
        """
        self._model = model
        self._facts = facts_of(model)
        self._plain = PlainEngine(model)
        parameters = inspect.signature(model.forward).parameters
        if self._facts.is_encoder_decoder or "position_ids" not in parameters:
            raise ForestUnsupportedError(f"{type(model).__name__} takes no position_ids")
        if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
            # Llama 4; a probe is too short to see it.
            raise ForestUnsupportedError(f"{type(model).__name__} scales attention by column")
        if "logits_to_keep" not in parameters:
            raise ForestUnsupportedError(f"{type(model).__name__} takes no logits_to_keep")

    def predict(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None = None
    ) -> Predictions:
        """Run the rows; see ``PredictingEngine``.

        Raises:
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        check_table(self._model, self._facts)
        check_rows(rows, prompts, self._facts, None)
        if depends_on_neighbours(rows, prompts, self._facts):
            return self._plain.predict(rows, prompts, head)
        forest = Forest.of(rows, [int(prompt.shape[0]) for prompt in prompts])
        used = [root.prompt for root in forest.roots if root.prompt >= 0]
        values_of = [prompts[p] for p in used if len(prompts[p])]
        table = torch.cat(values_of) if values_of else None
        offsets = _offsets(prompts, used)
        device = self._model.device
        wanted, place = torch.unique(forest.predictors, return_inverse=True)
        plan = visibility_of(forest).to(device)
        with virtual_rows(self._model, table), forest_attention(self._model, plan):
            logits = self._model(
                input_ids=forest.ids(self._facts.vocabulary, offsets).unsqueeze(0).to(device),
                position_ids=forest.positions().unsqueeze(0).to(device),
                attention_mask=torch.ones(1, len(forest), dtype=torch.long, device=device),
                logits_to_keep=wanted.to(device),
                use_cache=False,
            ).logits[0]
        states = head.states if head is not None else None  # [1, K, H]
        scored = (place.to(device), forest.labels.to(device), forest.row_index.to(device))
        return Predictions(logits, None if states is None else states[0], *scored)


def _offsets(prompts: Sequence[Tensor], used: Sequence[int]) -> list[int]:
    """Return where each used prompt starts in the concatenated table."""
    offsets, at = [0] * len(prompts), 0
    for prompt in used:
        offsets[prompt] = at
        at += int(prompts[prompt].shape[0])
    return offsets
