"""The arguments of ``forward`` and ``generate`` as transformers' callers give them: names, rows and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from softprompt.backbone import Base, output_limit
from softprompt.engine import (
    IGNORED,
    Layout,
    Prefixes,
    PromptTable,
    cached_tokens,
    check_context,
    is_packed,
)
from softprompt.errors import ConfigError


def bound(
    parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], *, what: str
) -> dict[str, Any]:
    """Return all arguments of a call by name.

    Args:
        parameters: Names of the base's parameters, in order.
        args: Positional arguments.
        kwargs: Keyword arguments.
        what: The method, for the message.

    Raises:
        ConfigError: For more positional arguments than the base takes.
    """
    if len(args) > len(parameters):
        raise ConfigError(
            f"{what} takes {len(parameters)} positional arguments, got {len(args)}; pass them by name"
        )
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def batch_size(inputs: dict[str, Any]) -> int:
    """Return the rows of a call.

    Raises:
        ConfigError: If it has no input.
    """
    if inputs.get("encoder_outputs") is not None:
        return int(inputs["encoder_outputs"][0].shape[0])
    return int(tokens_of(inputs).shape[0])


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Return the input of a call, ids ``[B, T]`` or embeddings ``[B, T, H]``.

    Raises:
        ConfigError: If it has both or neither.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ConfigError("pass exactly one of input_ids and inputs_embeds")
    return cast(Tensor, ids if ids is not None else embeds)


def decoder_inputs(base: Base, prompts: PromptTable, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call with virtual tokens before a seq2seq decoder's ids.

    Each row of the decoder is ``[prompt | start token, answer]``: the prompt takes the first positions,
    and the outputs cover P + T' columns, as PEFT's do for multitask prompts with two submodules. A
    filled cache already holds the prompt.

    Raises:
        ConfigError: If there are neither ``decoder_input_ids`` nor ``labels``.
        ContextOverflowError: If prompt and answer exceed the decoder's positions.
    """
    if cached_tokens(inputs.get("past_key_values")):
        return inputs
    inputs = dict(inputs)
    labels = inputs.get("labels")
    ids: Tensor | None = inputs.get("decoder_input_ids")
    if ids is None and labels is not None:
        ids = cast(Any, base.model).prepare_decoder_input_ids_from_labels(labels=labels)
    if ids is None:
        raise ConfigError(
            "a decoder prompt needs decoder_input_ids or labels (decoder_inputs_embeds are not supported)"
        )
    mask = inputs.get("decoder_attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    check_context(int(mask.sum(1).max()), prompts.width, output_limit(base.model), what="decoder")
    layout = Layout.of(mask, prompts, compact=True)
    inputs["decoder_input_ids"] = layout.ids(ids, base.facts.vocabulary, base.facts.pad_id)
    if not bool(layout.mask.all()):
        inputs["decoder_attention_mask"] = layout.mask
    if labels is not None:
        inputs["labels"] = layout.spread(labels, IGNORED)
    return inputs


def check_prefixed(base: Base, prefixes: Prefixes, inputs: dict[str, Any]) -> None:
    """Refuse arguments of a forward call that would be misread behind prefixes.

    Raises:
        ConfigError: For attention masks of one's own, and packed rows.
        ContextOverflowError: If prefix and input exceed the context.
    """
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = inputs.get(name)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ConfigError(
                f"{name} must be [B, T] behind a prefix, which each layer masks by its own rule; pass "
                "padding alone"
            )
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() == 2 and is_packed(positions):
        raise ConfigError(
            "position_ids start again inside a row, and a prefix stands before whole rows; pass each sequence "
            "as a row of its own"
        )
    tokens, mask, limit = _columns(base, inputs)
    counts = [tokens] * len(prefixes.lengths)
    if mask is not None and mask.dim() == 2:
        counts = mask.sum(1).tolist()
    for count, virtual in set(zip(counts, prefixes.lengths.tolist(), strict=True)):
        check_context(int(count), int(virtual), limit)


def _columns(base: Base, inputs: dict[str, Any]) -> tuple[int, Tensor | None, int | None]:
    """Return the columns behind the prefixes, their mask, and how many the model has."""
    if base.is_encoder_decoder:
        names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        limit, mask = output_limit(base.model), inputs.get("decoder_attention_mask")
    else:
        names = ("input_ids", "inputs_embeds", "labels")
        limit, mask = base.facts.context_length, inputs.get("attention_mask")
    found = [inputs[name] for name in names if inputs.get(name) is not None]
    return (int(found[0].shape[1]) if found else 0), mask, limit
