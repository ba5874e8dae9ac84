"""Prompts before the decoder's input of a seq2seq model.

Each row of the decoder is ``[prompt | start token, answer]``: the prompt takes the first positions,
and the outputs cover P + T' columns, as PEFT's do for multitask prompts with two submodules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from softprompt.attach.tasks import IGNORED
from softprompt.backbone import Facts, output_limit
from softprompt.engine import Layout, PromptTable, check_context
from softprompt.errors import ConfigError


def decoder_inputs(
    model: PreTrainedModel, facts: Facts, prompts: PromptTable, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a forward call with prompts before the decoder's ids.

    A filled cache already holds them.

    Raises:
        ConfigError: If there are neither ``decoder_input_ids`` nor ``labels``.
        ContextOverflowError: If prompt and answer exceed the decoder's positions.
    """
    if _seen(inputs.get("past_key_values")):
        return inputs
    inputs = dict(inputs)
    labels = inputs.get("labels")
    ids: Tensor | None = inputs.get("decoder_input_ids")
    if ids is None and labels is not None:
        ids = cast(Any, model).prepare_decoder_input_ids_from_labels(labels=labels)
    if ids is None:
        raise ConfigError(
            "a decoder prompt needs decoder_input_ids or labels (decoder_inputs_embeds are not taken)"
        )
    mask = inputs.get("decoder_attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    check_context(int(mask.sum(1).max()), prompts.width, output_limit(model), what="decoder")
    layout = Layout.of(mask, prompts, compact=True)
    inputs["decoder_input_ids"] = layout.ids(ids, facts.vocabulary, facts.pad_id)
    if not bool(layout.mask.all()):
        inputs["decoder_attention_mask"] = layout.mask
    if labels is not None:
        inputs["labels"] = layout.spread(labels, IGNORED)
    return inputs


def decoder_steps(
    original: Callable[..., dict[str, Any]], facts: Facts, prompts: PromptTable
) -> Callable[..., dict[str, Any]]:
    """Return a ``prepare_inputs_for_generation`` that puts prompts before the ids of the first pass.

    Raises:
        ConfigError: If the rows' prompts are of unlike lengths, which a decoder without padding cannot
            take.
    """
    lengths = sorted(set(prompts.lengths.tolist()))
    if len(lengths) > 1:
        raise ConfigError(
            f"generate needs decoder prompts of one length in a batch, got {lengths}; "
            "generate for one length at a time"
        )

    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared = original(*args, **kwargs)
        if _seen(prepared.get("past_key_values")):
            return prepared
        ids = prepared["decoder_input_ids"]
        layout = Layout.of(torch.ones_like(ids), prompts.repeated(ids.shape[0]))
        prepared["decoder_input_ids"] = layout.ids(ids, facts.vocabulary, facts.pad_id)
        mask = prepared.get("decoder_attention_mask")
        if mask is not None:
            prepared["decoder_attention_mask"] = Layout.of(
                mask, prompts.repeated(ids.shape[0])
            ).mask
        return prepared

    return prepare


def _seen(cache: Any) -> int:
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
