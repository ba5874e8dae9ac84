"""Running a model's own forward, and ``generate``, behind prefixes.

Two ways: inside attention, with the text alone in the cache, for models that honour
transformers' attention interface; and as the first columns of the cache, for the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from softprompt.backbone import Base, Facts, cache_in, cached_tokens, recomputes_layers, with_cache, without_cache
from softprompt.engine import Prefixes, counts_images
from softprompt.engine.prefixes.prefix_attention import EAGER, NAME, PrefixPlan, active_plan
from softprompt.errors import BackboneError, ConfigError


@contextmanager
def prefixed_attention(base: Base, prefixes: Prefixes) -> Iterator[None]:
    """Inject prefixes into the attention of every pass in the context; masks and caches hold the text alone.

    Raises:
        BackboneError: If the model does not honour the attention interface.
    """
    with base.lock, ExitStack() as stack:
        own = base.model.config.get_text_config()._attn_implementation
        (table,) = stack.enter_context(gathered_gradient(base, [prefixes.table]))
        prefixes = replace(prefixes, table=table, sources=base.prefix_sources)
        plan = PrefixPlan(prefixes, own if own == EAGER else "sdpa", base.is_encoder_decoder)
        token = active_plan.set(plan)
        stack.callback(active_plan.reset, token)
        _shift_positions(base, prefixes, stack)
        first = base.model.register_forward_pre_hook(_only_own_passes, with_kwargs=True, prepend=True)
        stack.callback(first.remove)
        # Products are swapped by the pass around this one, or not at all.
        stack.enter_context(base.running(attention=NAME, products=()))
        yield


def _shift_positions(base: Base, prefixes: Prefixes, stack: ExitStack) -> None:
    """Let the positions of the text start behind each row's prefix."""
    model, facts = base.model, base.facts
    if facts.is_encoder_decoder:
        table = getattr(cast(Any, model).get_decoder(), "embed_positions", None)
        if table is not None:
            _shift_decoder(table, prefixes, stack)
        return

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = active_plan.get()
        if plan is None or plan.idle:
            return None
        kwargs = dict(kwargs)
        given = kwargs.get("position_ids")
        if given is None and counts_images(model, kwargs):
            given = image_positions(model, kwargs)
        kwargs["position_ids"] = text_positions(facts, kwargs, given)
        if prefixes.source(0) is not None:  # models count what the first layer's cache holds
            kwargs["position_ids"] = kwargs["position_ids"] + _column(prefixes, kwargs)
        for name in _read_by_masks(model, kwargs):
            kwargs[name] = _behind(kwargs[name], prefixes.repeated(len(kwargs[name])))
        return args, kwargs

    if facts.accepts_position_ids:
        stack.callback(model.register_forward_pre_hook(shift, with_kwargs=True).remove)


def text_positions(facts: Facts, kwargs: dict[str, Any], given: Tensor | None = None) -> Tensor:
    """Return the positions ``[B, T]`` of the tokens of a call in their own text."""
    if given is not None:
        return given
    tokens = tokens_of(kwargs)
    mask = kwargs.get("attention_mask")
    if mask is None:
        seen = cached_tokens(kwargs)
        counted = torch.arange(seen, seen + tokens.shape[1], device=tokens.device).unsqueeze(0)
    else:
        counted = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return counted + facts.pad_id + 1 if facts.positions_from_ids else counted


def _column(prefixes: Prefixes, kwargs: dict[str, Any]) -> Tensor:
    tokens = tokens_of(kwargs)
    return prefixes.repeated(tokens.shape[0]).positions.to(tokens.device).unsqueeze(1)


def tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a forward call, ids or embeddings."""
    ids = kwargs.get("input_ids")
    return cast(Tensor, ids if ids is not None else kwargs["inputs_embeds"])


def _shift_decoder(table: nn.Module, prefixes: Prefixes, stack: ExitStack) -> None:
    """Shift the learned positions of a seq2seq decoder, whose forward takes none."""
    if "position_ids" not in inspect.signature(table.forward).parameters:
        raise BackboneError(f"{type(table).__name__} takes no position_ids")
    rows: list[int] = []

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = kwargs["position_ids"]  # [T], the same in every row
        tokens = next(iter(args), kwargs.get("input_ids"))
        count = prefixes.lengths.shape[0] if not isinstance(tokens, Tensor) else tokens.shape[0]
        lengths = prefixes.repeated(count).lengths.to(positions.device)
        rows.append(count)
        return args, kwargs | {"position_ids": (positions + lengths.unsqueeze(1)).flatten()}

    def part(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.view(rows.pop(), -1, output.shape[-1])

    stack.callback(table.register_forward_pre_hook(shift, with_kwargs=True).remove)
    stack.callback(table.register_forward_hook(part).remove)


_own_pass: ContextVar[list[bool] | None] = ContextVar("softprompt_own_pass", default=None)
"""Inside ``generate``, whether its loop has prepared the next pass; None outside."""


@contextmanager
def own_passes() -> Iterator[Callable[[], None]]:
    """Let only passes that are announced have prefixes: ``generate``'s own, not those of a logits processor."""
    prepared = [False]
    token = _own_pass.set(prepared)
    try:
        yield lambda: prepared.__setitem__(0, True)
    finally:
        _own_pass.reset(token)


def _is_own_pass() -> bool:
    prepared = _own_pass.get()
    if prepared is None:
        return True
    own, prepared[0] = prepared[0], False
    return own


def _only_own_passes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plan = active_plan.get()
    if plan is not None:
        plan.idle = not _is_own_pass()


def _read_by_masks(model: nn.Module, kwargs: dict[str, Any]) -> list[str]:
    """Return the token types of a call that are read by the masks alone: an image's tokens see each other."""
    make = getattr(model, "create_masks_for_generate", None)
    names = () if make is None else inspect.signature(make).parameters
    return [name for name in names if "token_type_ids" in name and kwargs.get(name) is not None]


def _behind(types: Tensor, prefixes: Prefixes) -> Tensor:
    """Return token types ``[B, T]`` with each row's prefix in front, at the columns that masks are asked for."""
    moved = types.new_zeros(types.shape[0], types.shape[1] + prefixes.width)
    columns = torch.arange(types.shape[1], device=types.device) + prefixes.lengths.to(types.device).unsqueeze(1)
    return moved.scatter(1, columns, types)


def image_positions(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """Return the positions ``[3, B, T]`` that a model makes of a call's images."""
    owner = next(part for part in (model, getattr(model, "base_model", None)) if hasattr(part, "get_rope_index"))
    make = cast(Any, owner).get_rope_index
    names = inspect.signature(make).parameters.keys() - {"kwargs"}
    positions, _ = make(**{name: kwargs.get(name) for name in names})
    return cast(Tensor, positions)


@contextmanager
def prefixed_cache(base: Base, prefixes: Prefixes, *, counts_columns: bool = False) -> Iterator[None]:
    """Inject prefixes into the cache of every pass in the context, masks and positions extended over them.

    Args:
        base: A decoder.
        prefixes: The rows' prefixes.
        counts_columns: Whether the model counts columns rather than positions, so that padding may not
            stand between prefix and text.
    """
    model, facts = base.model, base.facts
    if not torch.equal(prefixes.positions, prefixes.lengths):
        raise ConfigError(
            f"virtual tokens of a prefix of {facts.architecture} cannot be left out: its cache holds them"
        )
    prefixes = prefixes.shifted()

    def drop_cache(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        # A caller without a cache feeds the whole text again, which must not meet its own past.
        return without_cache(output) if kwargs.get("use_cache") is False else output

    def inject(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_own_pass():
            return None
        if recomputes_layers(model) and torch.is_grad_enabled():
            raise ConfigError(
                f"gradient checkpointing drops the cache that holds the prefix of {facts.architecture}; turn it off"
            )
        kwargs = dict(kwargs)
        tokens = tokens_of(kwargs)
        own = prefixes.repeated(tokens.shape[0])
        cache, seen = cache_in(kwargs), cached_tokens(kwargs)
        text = max(0, seen - own.width) + tokens.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = tokens.new_ones(tokens.shape[0], text, dtype=torch.long)
        if counts_columns and bool((mask[:, 0] == 0).any()):
            raise ConfigError(
                f"{facts.architecture} counts columns, so padding may not stand between prefix and text; pad "
                "on the right, or run rows of one length"
            )
        if not seen:
            filled = cache if isinstance(cache, Cache) else DynamicCache()
            own.fill(filled, torch.empty(0, dtype=base.dtype, device=base.device))
            kwargs = with_cache(model, kwargs, filled)
        kwargs["attention_mask"] = torch.cat([own.columns().to(mask), mask], dim=1)
        if facts.accepts_position_ids:
            whole = kwargs["attention_mask"].long().cumsum(1) - 1
            kwargs["position_ids"] = whole.clamp(min=0)[:, -tokens.shape[1] :]
        return args, kwargs

    injected = model.register_forward_pre_hook
    with base.lock, injected(inject, with_kwargs=True), model.register_forward_hook(drop_cache, with_kwargs=True):
        yield


class _HandOn(torch.autograd.Function):
    """Return the embeddings; in backward, hand what gathered in the leaf on to the prefix."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor, table: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return gradients[0], gathered, None


def _reentrant(model: nn.Module) -> bool:
    """Tell whether layers will be checkpointed with a backward of their own each."""
    if not recomputes_layers(model):
        return False
    for module in model.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None:
            return bool(getattr(run, "keywords", {}).get("use_reentrant", True))
    return False


@contextmanager
def gathered_gradient(base: Base, values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the same values for the layers, as leaves where backward is reentrant.

    There each checkpointed layer has a backward of its own, which would run through whatever made the
    values once a layer, and find its graph freed. What gathers in a leaf is handed on to its value when
    the gradient of the embeddings is computed, the last of the pass.
    """
    model = base.model
    trained = any(value.requires_grad for value in values) and torch.is_grad_enabled()
    if not (trained and _reentrant(model)):
        yield list(values)
        return
    leaves = [value.detach().requires_grad_(value.requires_grad) for value in values]

    def hand_on(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        for value, leaf in zip(values, leaves, strict=True):
            if value.requires_grad:
                output = cast(Any, _HandOn).apply(output, value, leaf)
        return output

    owners: list[Any] = [model]
    if base.is_encoder_decoder:
        owners = [model.get_encoder(), cast(Any, model).get_decoder()]
    with ExitStack() as stack:
        for embedding in {owner.get_input_embeddings() for owner in owners}:
            stack.enter_context(embedding.register_forward_hook(hand_on))
        yield leaves
