"""The prompt's keys and values once, expanded over the rows, for models without the forest.

Rows stand padded on the right directly behind the cached prompts, so that columns count as the
model expects (ALiBi, local windows).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from softprompt.backbone import Base, recomputes_layers
from softprompt.engine.layout import pad_rows
from softprompt.engine.plain import PlainEngine
from softprompt.engine.predictions import IGNORED, Engine, HeadInput, Predictions
from softprompt.engine.prompt_table import Prefixes, PromptTable
from softprompt.engine.rows import EngineRow, depends_on_neighbours
from softprompt.errors import BackboneError
from softprompt.prompts import Prompt


@final
class ExpandEngine(Engine):
    """Scores targets behind a prompt that is run once."""

    name = "expand"

    def __init__(self, base: Base) -> None:
        """Prepare for a base.

        Raises:
            BackboneError: If the model has no cache of keys and values to expand.
        """
        super().__init__(base)
        self._plain = PlainEngine(base)
        parameters = inspect.signature(base.model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        if self._facts.is_encoder_decoder or "past_key_values" not in parameters:
            raise BackboneError(f"{self._facts.architecture} has no decoder cache to expand")

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``."""
        used = [p for p in dict.fromkeys(row.prompt for row in rows) if p is not None and p.tokens]
        given = [prompt.prefix is not None for prompt in used]
        if (
            not used
            or recomputes_layers(self._base.model)
            or depends_on_neighbours(rows, self._facts)
            or any(row.at and row.input_tokens for row in rows)
            or any(given) != all(given)
            or not all(row.source for row in rows)
        ):
            # Checkpointing drops the cache; an empty source is predicted from the prompt's own pass;
            # the keys of a prompt behind other tokens are different in every row.
            return self._plain.run_alike(rows, head)
        if all(given):
            return self._text_pass(rows, used, *self._given(used), head)
        table = PromptTable.of(used)
        with table.injected(self._base):
            cache, mask = self._prompt_pass(table)
            return self._text_pass(rows, used, cache, mask, head)

    def _given(self, used: Sequence[Prompt]) -> tuple[Cache, Tensor]:
        """Return prompts that are keys and values as ``_prompt_pass`` returns those of virtual tokens."""
        prefixes = Prefixes.of(used)
        assert prefixes is not None, "none of the prompts is keys and values"
        prefixes = prefixes.shifted()
        cache = DynamicCache()
        prefixes.fill(
            cache, torch.empty(0, dtype=self._base.model.dtype, device=self._base.model.device)
        )
        return cache, prefixes.columns().long().to(self._base.model.device)

    def _prompt_pass(self, prompts: PromptTable) -> tuple[Cache, Tensor]:
        """Return the keys and values of the prompts, ``[K, A_kv, P, D]`` a layer, and their mask ``[K, P]``."""
        # Virtual token at each column [K, P], negative where padded.
        token = torch.arange(prompts.width) - (prompts.width - prompts.lengths).unsqueeze(1)
        virtual = token + prompts.starts.unsqueeze(1) + self._facts.vocabulary
        ids = torch.where(token >= 0, virtual, self._facts.pad_id).to(self._base.model.device)
        mask = (token >= 0).long().to(self._base.model.device)
        cache = DynamicCache()
        output = self._base.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            **self._positioned(mask, ids.shape[1]),
        )
        cache = output.past_key_values
        if not isinstance(cache, Cache) or any(
            type(layer) is not DynamicLayer for layer in cache.layers
        ):
            raise BackboneError(
                f"{self._facts.architecture} keeps more than keys and values, which cannot be expanded"
            )
        return cache, mask

    def _text_pass(
        self,
        rows: Sequence[EngineRow],
        used: Sequence[Prompt],
        cache: Cache,
        mask: Tensor,
        head: HeadInput | None,
    ) -> Predictions:
        ids, text_mask = pad_rows(
            [row.source + row.target for row in rows], left=False, pad_id=self._facts.pad_id
        )
        device = self._base.model.device
        ids, text_mask = ids.to(device), text_mask.to(device)
        number: dict[Prompt | None, int] = {prompt: i for i, prompt in enumerate(used)}
        owner = torch.tensor([number.get(row.prompt, 0) for row in rows], device=device)
        prompted = torch.tensor([row.prompt in number for row in rows], device=device).unsqueeze(1)
        whole = torch.cat([mask[owner] * prompted, text_mask], dim=1)  # [B, P + T]
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            where = slice(len(row.source) - 1, len(row.source) + len(row.target) - 1)
            labels[i, where] = torch.tensor(row.target)
        columns = (labels != IGNORED).any(0).nonzero()[:, 0]
        extra: dict[str, Any] = {"logits_to_keep": columns} if self._keeps_logits else {}
        logits = self._base.model(
            input_ids=ids,
            past_key_values=_expanded(cache, owner),
            use_cache=True,
            **self._positioned(whole, ids.shape[1]),
            **extra,
        ).logits
        hidden = head.states if head is not None else None
        if not self._keeps_logits:
            logits, hidden = logits[:, columns], None if hidden is None else hidden[:, columns]
        return Predictions.of_columns(logits, hidden, labels[:, columns])

    def _positioned(self, mask: Tensor, columns: int) -> dict[str, Tensor]:
        """Return mask and positions of the last ``columns`` of a batch."""
        inputs = {"attention_mask": mask}
        if self._facts.accepts_position_ids:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -columns:]
        return inputs


def _expanded(cache: Cache, owner: Tensor) -> Cache:
    """Return the cache of each row's prompt, ``[B, A_kv, P, D]`` a layer."""
    expanded = DynamicCache()
    for index, layer in enumerate(cast(Sequence[Any], cache.layers)):
        keys, values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
        expanded.update(keys, values, index)
    return expanded
