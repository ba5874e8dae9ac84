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
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from softprompt.backbone import facts_of, recomputes_layers, virtual_rows
from softprompt.engine.context import check_rows, depends_on_neighbours
from softprompt.engine.forest.attention import ForestUnsupportedError
from softprompt.engine.layout import Prompts
from softprompt.engine.plain import PlainEngine, pad_rows
from softprompt.engine.predictions import IGNORED, HeadInput, PredictingEngine, Predictions
from softprompt.engine.prefixes.values import Prefixes
from softprompt.engine.rows import EngineRow, is_keys_and_values, prompt_length


@final
class ExpandEngine(PredictingEngine):
    """Scores targets behind a prompt that is run once."""

    name = "expand"

    def __init__(self, model: PreTrainedModel) -> None:
        """Prepare for a model.

        Raises:
            ForestUnsupportedError: If the model has no cache of keys and values to expand.
        """
        self._model = model
        self._facts = facts_of(model)
        self._plain = PlainEngine(model)
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        if self._facts.is_encoder_decoder or "past_key_values" not in parameters:
            raise ForestUnsupportedError(f"{type(model).__name__} has no decoder cache to expand")

    def predict(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None = None
    ) -> Predictions:
        """Run the rows; see ``PredictingEngine``.

        Raises:
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        check_rows(self._model, self._facts, rows, prompts)
        used = sorted({row.prompt for row in rows if prompt_length(prompts, row.prompt)})
        given = [is_keys_and_values(prompts[p]) for p in used]
        checkpointing = recomputes_layers(self._model)
        unlike = depends_on_neighbours(rows, prompts, self._facts)
        behind = any(row.at for row in rows if row.prompt in used)
        mixed = any(given) and not all(given)
        if (
            not used
            or checkpointing
            or unlike
            or behind
            or mixed
            or not all(r.source for r in rows)
        ):
            # Checkpointing drops the cache; an empty source is predicted from the prompt's own pass;
            # the keys of a prompt behind other tokens are different in every row.
            return self._plain.predict(rows, prompts, head)
        if all(given):
            return self._text_pass(rows, used, *self._given(prompts, used), head)
        chosen = Prompts.of([prompts[p] for p in used], range(len(used)))
        with virtual_rows(self._model, chosen.table):
            cache, mask = self._prompt_pass(chosen)
            return self._text_pass(rows, used, cache, mask, head)

    def _given(self, prompts: Sequence[Tensor], used: Sequence[int]) -> tuple[Cache, Tensor]:
        """Return prompts that are keys and values as ``_prompt_pass`` returns those of rows."""
        prefixes = Prefixes.of([prompts[p] for p in used], range(len(used)))
        assert prefixes is not None
        prefixes = prefixes.shifted()
        cache = DynamicCache()
        prefixes.fill(cache, torch.empty(0, dtype=self._model.dtype, device=self._model.device))
        return cache, prefixes.columns().long().to(self._model.device)

    def _prompt_pass(self, prompts: Prompts) -> tuple[Cache, Tensor]:
        """Return the keys and values of the prompts, ``[K, A_kv, P, D]`` a layer, and their mask ``[K, P]``."""
        column = torch.arange(prompts.width, device=prompts.lengths.device)
        row = column - (prompts.width - prompts.lengths).unsqueeze(
            1
        )  # [K, P], negative where padded
        virtual = row + prompts.starts.unsqueeze(1) + self._facts.vocabulary
        ids = torch.where(row >= 0, virtual, self._facts.pad_id).to(self._model.device)
        mask = (row >= 0).long().to(self._model.device)
        cache = DynamicCache()
        output = self._model(
            input_ids=ids, past_key_values=cache, use_cache=True, **self._placed(mask, ids.shape[1])
        )
        cache = output.past_key_values
        if not isinstance(cache, Cache) or any(
            type(layer) is not DynamicLayer for layer in cache.layers
        ):
            raise ForestUnsupportedError(
                f"{type(self._model).__name__} keeps more than keys and values, which cannot be expanded"
            )
        return cache, mask

    def _text_pass(
        self,
        rows: Sequence[EngineRow],
        used: Sequence[int],
        cache: Cache,
        mask: Tensor,
        head: HeadInput | None,
    ) -> Predictions:
        ids, text_mask = pad_rows(
            [row.source + row.target for row in rows], left=False, pad_id=self._facts.pad_id
        )
        device = self._model.device
        ids, text_mask = ids.to(device), text_mask.to(device)
        owner = torch.tensor(
            [used.index(r.prompt) if r.prompt in used else 0 for r in rows], device=device
        )
        prompted = torch.tensor([r.prompt in used for r in rows], device=device).unsqueeze(1)
        whole = torch.cat([mask[owner] * prompted, text_mask], dim=1)  # [B, P + T]
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            where = slice(len(row.source) - 1, len(row.source) + len(row.target) - 1)
            labels[i, where] = torch.tensor(row.target)
        columns = (labels != IGNORED).any(0).nonzero()[:, 0]
        extra: dict[str, Any] = {"logits_to_keep": columns} if self._keeps_logits else {}
        logits = self._model(
            input_ids=ids,
            past_key_values=_expanded(cache, owner),
            use_cache=True,
            **self._placed(whole, ids.shape[1]),
            **extra,
        ).logits
        hidden = head.states if head is not None else None
        if not self._keeps_logits:
            logits, hidden = logits[:, columns], None if hidden is None else hidden[:, columns]
        return Predictions.of_columns(logits, hidden, labels[:, columns])

    def _placed(self, mask: Tensor, columns: int) -> dict[str, Tensor]:
        """Return mask and positions of the last ``columns`` of a batch."""
        placed = {"attention_mask": mask}
        if self._facts.accepts_position_ids:
            placed["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -columns:]
        return placed


def _expanded(cache: Cache, owner: Tensor) -> Cache:
    """Return the cache of each row's prompt, ``[B, A_kv, P, D]`` a layer."""
    expanded = DynamicCache()
    for index, layer in enumerate(cast(Sequence[Any], cache.layers)):
        keys, values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
        expanded.update(keys, values, index)
    return expanded
