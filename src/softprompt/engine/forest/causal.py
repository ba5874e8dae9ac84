"""The forest path of causal models: one packed row of real tokens, logits where a target is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import Facts, facts_of, virtual_rows
from softprompt.engine.context import check_rows, depends_on_neighbours
from softprompt.engine.forest.attention import ForestUnsupportedError, forest_attention
from softprompt.engine.forest.causal_plan import causal_plan
from softprompt.engine.forest.prefixes import forest_prefixes, why_unread
from softprompt.engine.placed import PlacedPrompts
from softprompt.engine.plain import PlainEngine
from softprompt.engine.predictions import HeadInput, PredictingEngine, Predictions
from softprompt.engine.prefixes.gradient import gathered_gradient
from softprompt.engine.rows import EngineRow, any_prefix


def require_packable(model: PreTrainedModel, facts: Facts) -> None:
    """Refuse a model that cannot take the tokens of several rows as one.

    Raises:
        ForestUnsupportedError: If it cannot.
    """
    parameters = inspect.signature(model.forward).parameters
    if facts.is_encoder_decoder or "position_ids" not in parameters:
        raise ForestUnsupportedError(f"{type(model).__name__} takes no position_ids")
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        # Llama 4; a probe is too short to see it.
        raise ForestUnsupportedError(f"{type(model).__name__} scales attention by column")
    if "logits_to_keep" not in parameters:
        raise ForestUnsupportedError(f"{type(model).__name__} takes no logits_to_keep")


@final
class ForestEngine(PredictingEngine):
    """Scores targets over a forest; exact, with no padding in token-wise layers."""

    name = "forest"

    def __init__(self, model: PreTrainedModel, *, trusted: bool = False) -> None:
        """Prepare for a model; ``trusted`` skips the probe for prompts of keys and values.

        Raises:
            ForestUnsupportedError: If the model cannot take a packed row.
        """
        self._model = model
        self._trusted = trusted
        self._facts = facts_of(model)
        self._plain = PlainEngine(model)
        require_packable(model, self._facts)

    def predict(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None = None
    ) -> Predictions:
        """Run the rows; see ``PredictingEngine``.

        Raises:
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        check_rows(self._model, self._facts, rows, prompts)
        if depends_on_neighbours(rows, prompts, self._facts) or not self._reads(rows, prompts):
            return self._plain.predict(rows, prompts, head)
        placed = PlacedPrompts.of(prompts, (row.prompt for row in rows), self._facts.vocabulary)
        plan = causal_plan(rows, prompts, placed)
        device = self._model.device
        wanted, place = plan.targets.places()
        kept = forest_prefixes(plan, rows, prompts)
        with (
            gathered_gradient(self._model, kept.values) as values,
            virtual_rows(self._model, placed.table),
            forest_attention(self._model, kept.visibility.to(device), values),
        ):
            logits = self._model(
                input_ids=plan.ids.unsqueeze(0).to(device),
                position_ids=plan.positions.unsqueeze(0).to(device),
                attention_mask=torch.ones(1, len(plan), dtype=torch.long, device=device),
                logits_to_keep=wanted.to(device),
                use_cache=False,
            ).logits
        states = head.states if head is not None else None  # [1, K, H]
        return Predictions.of_stream(logits, states, place, plan.targets)

    def reads_keys_and_values(self) -> bool:
        """Tell whether prompts of keys and values run in the forest too; probed once per model."""
        if self._trusted:
            return True
        model = self._model
        return not why_unread(model, lambda: ForestEngine(model, trusted=True), self._plain)

    def _reads(self, rows: Sequence[EngineRow], prompts: Sequence[Tensor]) -> bool:
        """Tell whether the forest reads the rows' prompts of keys and values as the plain path does."""
        return not any_prefix(rows, prompts) or self.reads_keys_and_values()
