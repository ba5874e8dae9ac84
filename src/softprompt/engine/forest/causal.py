"""The forest path of causal models: one packed row of real tokens, logits where a target is.

Prompts of keys and values stand behind the stream's own keys, seen by the rows below them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from softprompt.backbone import Base
from softprompt.engine import (
    Engine,
    EngineRow,
    HeadInput,
    PlainEngine,
    Predictions,
    PromptTable,
    depends_on_neighbours,
    remembered,
    scoring_difference,
)
from softprompt.engine.forest.causal_plan import causal_forest
from softprompt.engine.forest.forest_attention import NAME, planned
from softprompt.engine.forest.plan import Owner, Plan, Span, Visibility, padded
from softprompt.engine.prefixes import gathered_gradient
from softprompt.errors import BackboneError


def require_packable(base: Base) -> None:
    """Refuse a model that cannot take the tokens of several rows as one.

    Raises:
        BackboneError: If it cannot.
    """
    model, facts = base.model, base.facts
    parameters = inspect.signature(model.forward).parameters
    if facts.is_encoder_decoder or "position_ids" not in parameters:
        raise BackboneError(f"{facts.architecture} takes no position_ids")
    if getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        # Llama 4; a probe is too short to see it.
        raise BackboneError(f"{facts.architecture} scales attention by column")
    if "logits_to_keep" not in parameters:
        raise BackboneError(f"{facts.architecture} takes no logits_to_keep")


@final
class ForestEngine(Engine):
    """Scores targets over a forest; exact, with no padding in token-wise layers."""

    name = "forest"

    def __init__(self, base: Base, *, trusted: bool = False) -> None:
        """Prepare for a base; ``trusted`` skips the probe for prompts of keys and values.

        Raises:
            BackboneError: If the model cannot take a packed row.
        """
        super().__init__(base)
        self._trusted = trusted
        self._plain = PlainEngine(base)
        require_packable(base)

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``."""
        if depends_on_neighbours(rows, self._facts) or not self._reads(rows):
            return self._plain.run_alike(rows, head)
        prompts = PromptTable.of([row.prompt for row in rows])
        plan = causal_forest(rows, prompts.ids(self._facts.vocabulary)).plan()
        device = self._base.device
        wanted, predictor = plan.targets.distinct()
        kept = forest_prefixes(plan, rows)
        with (
            self._base.lock,
            gathered_gradient(self._base, kept.values) as values,
            planned(kept.visibility.to(device), values),
            self._base.running(attention=NAME, virtual_tokens=prompts.virtual_tokens),
        ):
            logits = self._base.model(
                input_ids=plan.ids.unsqueeze(0).to(device),
                position_ids=plan.positions.unsqueeze(0).to(device),
                attention_mask=torch.ones(1, len(plan), dtype=torch.long, device=device),
                logits_to_keep=wanted.to(device),
                use_cache=False,
            ).logits
        states = head.states if head is not None else None  # [1, K, H]
        return Predictions.of_stream(logits, states, predictor, plan.targets)

    def reads_keys_and_values(self) -> bool:
        """Tell whether prompts of keys and values run in the forest too; probed once."""
        return self._trusted or not remembered(
            self._base,
            "keys and values in the forest",
            self._unread,
            otherwise="prefixes run on the plain path",
        )

    def _unread(self) -> str:
        """Return how the forest reads keys and values otherwise than the plain path; empty when alike."""
        candidate = ForestEngine(self._base, trusted=True)
        return scoring_difference(candidate, self._plain, self._base, keys_and_values=True)

    def _reads(self, rows: Sequence[EngineRow]) -> bool:
        """Tell whether the forest reads the rows' keys and values as the plain path does."""
        return not any(row.prefix_tokens for row in rows) or self.reads_keys_and_values()


@dataclass(frozen=True, slots=True)
class ForestPrefixes:
    """Who sees whom in a stream whose keys are followed by those of prefixes.

    Attributes:
        visibility: Who sees whom; key N is the first of the first prefix.
        values: The prefixes ``[L, 2, A_kv, P, D]``, in order.
    """

    visibility: Visibility
    values: tuple[Tensor, ...]


def forest_prefixes(plan: Plan, rows: Sequence[EngineRow]) -> ForestPrefixes:
    """Put the keys and values of the rows' prompts behind those of a stream, at positions 0 to P - 1."""
    prompts = dict.fromkeys(row.prompt for row in rows)
    values = {p: p.prefix for p in prompts if p is not None and p.prefix is not None}
    if not values:
        return ForestPrefixes(plan.visibility(), ())
    keys: dict[Owner, Tensor] = {}
    positions, first = [plan.positions], len(plan)
    for prompt in values:
        count = prompt.prefix_tokens
        keys[prompt] = torch.arange(first, first + count)
        positions.append(torch.arange(count))
        first += count
    kinds = [[_behind(span, keys.get(span.owner)) for span in kind] for kind in plan.kinds]
    seen = padded(kinds, plan.positions, torch.cat(positions))
    return ForestPrefixes(seen, tuple(values.values()))


def _behind(span: Span, keys: Tensor | None) -> Span:
    """Return a span whose queries see further keys before their own."""
    if keys is None:
        return span
    sees = torch.ones(len(span.queries), len(keys), dtype=torch.bool)
    return replace(
        span, keys=torch.cat([keys, span.keys]), sees=torch.cat([sees, span.sees], dim=1)
    )
