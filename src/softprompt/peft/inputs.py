"""Lays out a forward call's ids, mask, positions, token types and labels with the virtual tokens among them.

One function for every task type and all arguments together, so that none can be forgotten.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from softprompt.backbone import Base, Facts, cached_tokens, output_limit
from softprompt.engine import (
    IGNORED,
    Layout,
    Prefixes,
    PromptTable,
    TaskRules,
    check_context,
    check_token_ids,
    counts_images,
    is_packed,
    packed_mask,
    packs,
    per_token,
    without_padding,
)
from softprompt.errors import ConfigError, InterfaceError
from softprompt.prompts import TaskType


@dataclass(frozen=True, slots=True)
class Call:
    """One forward call of a prompted model: the caller's keyword arguments, and its rows' virtual tokens.

    Attributes:
        facts: The base's facts when the prompts were attached: a compiled graph does not read them anew.
    """

    base: Base
    facts: Facts
    inputs: dict[str, Any]
    prompts: PromptTable
    rules: TaskRules


@contextmanager
def prompted_pass(call: Call) -> Iterator[tuple[dict[str, Any], Layout | None]]:
    """Yield the base's keyword arguments for a call, to be run inside the context, and its layout.

    Inside, the layers of an encoder run without padding where that is exact, and prompts that do
    not see the input once.
    """
    inputs, layout = prompted_inputs(call)
    isolated = layout if not call.prompts.sees_input else None
    # A prompt that stands at other positions in another row is not the same.
    alike = isolated is None or "position_ids" in inputs or isolated.is_plain
    if call.rules.packs and alike and packs(call.base, inputs, isolated=isolated is not None):
        with without_padding(call.base, inputs["attention_mask"], isolated):
            yield inputs, layout
    else:
        yield (inputs if isolated is None else isolated_inputs(call.base, inputs, isolated)), layout


def prompted_inputs(call: Call) -> tuple[dict[str, Any], Layout | None]:
    """Return the base's keyword arguments for a call, prompts included, and their layout.

    A filled cache, or encoder outputs, already hold the prompt: it is not injected again, and
    a mask that covers the text alone is extended over it.

    Raises:
        ConfigError: If the shapes do not fit together.
        ContextOverflowError: If prompt and input exceed the context.
    """
    inputs = dict(call.inputs)
    check_token_ids(inputs.get("input_ids"), call.facts.vocabulary)
    encoder_outputs = inputs.get("encoder_outputs")
    if encoder_outputs is not None:
        return _behind_encoder(call, inputs, int(encoder_outputs[0].shape[1])), None
    tokens = tokens_of(inputs)
    seen = cached_tokens(inputs)
    if seen and not call.facts.is_encoder_decoder:
        return _behind_cache(call, inputs, tokens, seen), None
    return _at_the_start(call, inputs, tokens)


def _at_the_start(call: Call, inputs: dict[str, Any], tokens: Tensor) -> tuple[dict[str, Any], Layout]:
    facts, prompts = call.facts, call.prompts
    given: Tensor | None = inputs.get("attention_mask")
    mask = text_mask(inputs, tokens)
    if mask.shape != tokens.shape[:2]:
        raise ConfigError(
            f"attention_mask must be {list(tokens.shape[:2])} like the input, got {list(mask.shape)}; "
            "do not count the virtual tokens"
        )
    lengths = mask.sum(1).cpu()
    for real, virtual in set(zip(lengths.tolist(), prompts.lengths.tolist(), strict=True)):
        check_context(int(real), int(virtual), facts.context_length)
    first_column_counts = call.rules.pooled and not facts.takes_cache
    layout = Layout.of(
        mask,
        prompts,
        compact=facts.is_encoder_decoder or first_column_counts,
        text_first=first_column_counts and not call.prompts.sees_input,
    )
    positions = inputs.pop("position_ids", None)
    if inputs.get("input_ids") is not None:
        inputs["input_ids"] = layout.ids(inputs["input_ids"], facts.vocabulary, facts.pad_id)
    else:
        inputs["inputs_embeds"] = layout.embeds(inputs["inputs_embeds"], prompts.table)
    inputs["attention_mask"] = layout.mask
    if given is not None and given.dim() == 4:
        inputs["attention_mask"] = _extended_4d(given, prompts)
    elif given is None and positions is not None and is_packed(positions):
        dtype = torch.float32 if prompts.table.numel() == 0 else prompts.table.dtype
        inputs["attention_mask"] = packed_mask(positions, prompts.width, dtype)
    sees = positions is None and counts_images(call.base.model, inputs)
    if facts.accepts_position_ids and not sees and (positions is not None or _needs_positions(call, layout)):
        inputs["position_ids"] = layout.positions(positions)
    elif positions is not None:
        raise ConfigError(f"{facts.architecture} takes no position_ids; leave them out")
    _spread(call, inputs, layout)
    return inputs, layout


def _needs_positions(call: Call, layout: Layout) -> bool:
    moved = not layout.is_plain or (call.rules.pooled and not call.prompts.sees_input)
    return moved and not call.facts.positions_from_ids


def isolated_inputs(base: Base, inputs: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Return the arguments for prompts that do not see the input: a mask of its own for the encoder.

    A decoder attends to all encoder states, so the encoder of a seq2seq model is run here.
    """
    inputs = dict(inputs)
    mask = layout.isolated(base.dtype)
    if not base.is_encoder_decoder:
        return inputs | {"attention_mask": mask}
    given = {n: inputs.pop(n, None) for n in ("input_ids", "inputs_embeds")}
    states = base.model.get_encoder()(
        **{name: value for name, value in given.items() if value is not None}, attention_mask=mask
    )
    return inputs | {"encoder_outputs": states}


def _spread(call: Call, inputs: dict[str, Any], layout: Layout) -> None:
    """Move per-token arguments and labels to their columns; those of virtual tokens are 0, as padding's are."""
    shape = layout.text.shape[0], layout.text.shape[1] - layout.prompt_width
    for name in per_token(call.base.model, inputs, shape):
        inputs[name] = layout.spread(inputs[name], 0)
    labels = inputs.get("labels")
    if labels is not None and call.rules.token_labels:
        inputs["labels"] = layout.spread(labels, IGNORED)
        if call.rules.next_token:
            # Nothing real predicts the first token of a row; padding before it must not.
            inputs["labels"] = inputs["labels"].masked_fill(layout.first, IGNORED)
    if call.rules.span_labels:
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                inputs[name] = layout.moved(inputs[name])


def _behind_cache(call: Call, inputs: dict[str, Any], tokens: Tensor, seen: int) -> dict[str, Any]:
    """Continue from a cache that holds the prompt and ``seen - P`` text tokens."""
    width, new = call.prompts.width, tokens.shape[1]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(tokens.shape[0], seen - width + new, dtype=torch.long, device=tokens.device)
    if mask.dim() == 2:
        if mask.shape[1] == seen - width + new:
            mask = Layout.of(mask, call.prompts).mask
        elif mask.shape[1] != seen + new:
            raise ConfigError(
                f"attention_mask must cover the {seen - width} cached and {new} new tokens "
                f"({seen - width + new} columns), got {mask.shape[1]}"
            )
        inputs["attention_mask"] = mask
        check_context(int(mask.sum(1).max()), 0, call.facts.context_length)
        if call.facts.accepts_position_ids:
            given = inputs.get("position_ids")
            counted = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
            inputs["position_ids"] = counted if given is None else given + _column(call.prompts, given)
    return inputs


def _behind_encoder(call: Call, inputs: dict[str, Any], columns: int) -> dict[str, Any]:
    """Extend a text mask over encoder outputs that hold the prompt."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] + call.prompts.width == columns:
        inputs["attention_mask"] = Layout.of(mask, call.prompts, compact=True).mask
    return inputs


def _column(prompts: PromptTable, like: Tensor) -> Tensor:
    return prompts.lengths.to(like.device).unsqueeze(1)


def _extended_4d(mask: Tensor, prompts: PromptTable) -> Tensor:
    """Extend a caller's mask ``[B, 1, T, T]`` over prompt columns that every token sees."""
    width = prompts.width
    if not bool((prompts.lengths == width).all()):
        raise ConfigError("a 4-D attention_mask needs the same prompt length in every row")
    batch, heads, rows, columns = mask.shape
    seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    out = mask.new_full((batch, heads, rows + width, columns + width), hidden)
    out[..., :, :width] = seen
    causal = torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
    out[..., :width, :width] = out[..., :width, :width].masked_fill(~causal, hidden)
    out[..., width:, width:] = mask
    return out


_COLUMNS: Mapping[TaskType, str] = {
    TaskType.CAUSAL_LM: "position_ids labels",
    TaskType.SEQ_2_SEQ_LM: "decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels",
    TaskType.SEQ_CLS: "token_type_ids position_ids labels",
    TaskType.TOKEN_CLS: "token_type_ids position_ids labels",
    TaskType.QUESTION_ANS: "token_type_ids position_ids start_positions end_positions",
    TaskType.FEATURE_EXTRACTION: "token_type_ids position_ids",
}
"""Arguments of each task's forward that are columns of a data set, beside ids, mask and embeddings."""


def with_columns(forward: Callable[..., Any], task: TaskType) -> Callable[..., Any]:
    """Return a forward whose signature names its task's columns, which transformers' Trainer reads off it.

    Trainer reads the base's own signature instead where it recognises the model as PEFT's.
    """

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    names = ("input_ids", "attention_mask", "inputs_embeds", *_COLUMNS[task].split(), "task_ids")
    kind = inspect.Parameter
    parameters = [
        kind("self", kind.POSITIONAL_OR_KEYWORD),
        *(kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in names),
        kind("kwargs", kind.VAR_KEYWORD),
    ]
    cast(Any, run).__signature__ = inspect.Signature(parameters)
    return run


def bound(parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], *, what: str) -> dict[str, Any]:
    """Return all arguments of a call of the method ``what`` by name.

    Raises:
        InterfaceError: For more positional arguments than the base takes.
    """
    if len(args) > len(parameters):
        raise InterfaceError(
            f"{what} takes {len(parameters)} positional arguments, got {len(args)}; pass them by name"
        )
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def batch_size(inputs: dict[str, Any]) -> int:
    """Return the rows of a call; raise ``ConfigError`` where it has no input."""
    if inputs.get("encoder_outputs") is not None:
        return int(inputs["encoder_outputs"][0].shape[0])
    return int(tokens_of(inputs).shape[0])


def text_mask(inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return the padding mask ``[B, T]`` of a call, without padding where it gives none or one of its own."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Return the input of a call, ids ``[B, T]`` or embeddings ``[B, T, H]``.

    Raises:
        ConfigError: If it has both or neither, or they are of another rank (one row, multiple choice).
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ConfigError("pass exactly one of input_ids and inputs_embeds")
    name, tokens, rank = ("input_ids", ids, 2) if ids is not None else ("inputs_embeds", embeds, 3)
    assert tokens is not None
    if tokens.dim() != rank:
        hint = "run each choice as a row of its own" if tokens.dim() > rank else f"pass {name}[None]"
        form = "[B, T]" if rank == 2 else "[B, T, H]"
        raise ConfigError(f"{name} must be {form}, got {list(tokens.shape)}; {hint}")
    return cast(Tensor, tokens)


def decoder_inputs(base: Base, prompts: PromptTable, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call with virtual tokens before a seq2seq decoder's ids.

    Each row of the decoder is ``[prompt | start token, answer]``: the prompt takes the first positions,
    and the outputs cover P + T' columns, as PEFT's do for multitask prompts with two submodules. A
    filled cache already holds the prompt.

    Raises:
        ConfigError: If there are neither ``decoder_input_ids`` nor ``labels``.
        ContextOverflowError: If prompt and answer exceed the decoder's positions.
    """
    inputs, mask = dict(inputs), inputs.get("decoder_attention_mask")
    labels = inputs.get("labels")
    ids: Tensor | None = inputs.get("decoder_input_ids")
    if (seen := cached_tokens(inputs)) and mask is not None and ids is not None:
        if mask.shape[1] + prompts.width == seen + ids.shape[1]:  # the text's columns alone
            held = Layout.of(mask[:, : -ids.shape[1]], prompts, compact=True).mask  # as of the pass that filled it
            inputs["decoder_attention_mask"] = torch.cat([held, mask[:, -ids.shape[1] :]], dim=1)
    if seen:
        return inputs
    if ids is None and labels is not None:
        ids = cast(Any, base.model).prepare_decoder_input_ids_from_labels(labels=labels)
    if ids is None:
        raise ConfigError(
            "a decoder prompt needs decoder_input_ids or labels (decoder_inputs_embeds are not supported)"
        )
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
                f"{name} must be [B, T] behind a prefix, which each layer masks by its own rule; pass padding alone"
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
