"""The last hidden states of texts behind their prompts, which embeddings are made of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from softprompt.backbone import Base
from softprompt.engine.layout import Layout, pad_rows
from softprompt.engine.padded import PlainEngine
from softprompt.engine.predictions import see_input
from softprompt.engine.prefixes import prefix_path, prefixed
from softprompt.engine.rows import EngineRow, Prefixes, PromptTable, check_rows, depends_on_neighbours
from softprompt.errors import ConfigError


@torch.no_grad()
def text_states(base: Base, rows: Sequence[EngineRow]) -> list[Tensor]:
    """Return the last hidden states of each row's source ``[T, H]``, without those of its virtual tokens.

    They are what transformers' ``AutoModel`` gives as ``last_hidden_state``, of a seq2seq model its encoder.

    Raises:
        ConfigError: A prompt is keys and values, or stands in the decoder, and the model is a seq2seq one.
        SoftPromptError: A row does not fit the model.
    """
    check_rows(base, rows)
    facts, seq2seq = base.facts, base.is_encoder_decoder
    prefixes = Prefixes.of([row.prompt for row in rows])
    if seq2seq and any(row.prompt is not None and row.prompt.input is None for row in rows):
        raise ConfigError(
            f"{facts.architecture} embeds with its encoder, and this prompt has no virtual tokens there"
        )
    if len(rows) > 1 and (
        depends_on_neighbours(rows, facts)
        or PlainEngine(base).why_alone(see_input(rows))
        or (prefixes is not None and prefix_path(base).counts_columns)
    ):
        return [states for row in rows for states in text_states(base, [row])]
    ids, mask = (
        each.to(base.device)
        for each in pad_rows([row.source for row in rows], left=not seq2seq, pad_id=facts.pad_id)
    )
    prompts = PromptTable.of([row.prompt for row in rows], at=[row.at for row in rows])
    layout = Layout.of(mask, prompts, compact=seq2seq)
    isolated = seq2seq and not prompts.sees_input
    inputs: dict[str, Any] = {
        "input_ids": layout.ids(ids, facts.vocabulary, facts.pad_id),
        "attention_mask": layout.isolated(base.dtype) if isolated else layout.mask,
    }
    if not seq2seq and facts.accepts_position_ids and not facts.positions_from_ids:
        inputs["position_ids"] = layout.positions()
    with nullcontext() if prefixes is None else prefixed(base, prefixes), prompts.injected(base):
        states = _of_encoder(base, inputs) if seq2seq else _of_body(base, inputs)
    own = (layout.text >= 0) & layout.mask.bool()
    return [states[i, own[i]].float().cpu() for i in range(len(rows))]


def _of_encoder(base: Base, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = cast(Any, base.model.get_encoder())(**inputs).last_hidden_state
    return found


def _of_body(base: Base, inputs: dict[str, Any]) -> Tensor:
    """Return what the model below the head gives; the whole model is called, as prefixes hook on that."""
    seen: list[Tensor] = []
    hook = base.model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.model.forward).parameters else {}
    try:
        base.model(**inputs, use_cache=False, **least)
    finally:
        hook.remove()
    return seen[0]
