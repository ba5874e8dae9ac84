"""transformers' own ``generate`` behind prompts.

Its loop sees the text alone, so logits processors, stopping criteria, streamers and
``max_length`` mean what they mean without a prompt. Only the inputs of each forward pass are
rewritten, through the public ``prepare_inputs_for_generation``: virtual ids in front at the
first pass, the mask and positions extended over them at every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from softprompt.backbone import Base, Facts, VirtualVocabulary, cached_tokens, output_limit
from softprompt.engine.layout import Layout, per_token
from softprompt.engine.padded import BatchPrompts
from softprompt.engine.prefixes import own_passes, prefix_path
from softprompt.engine.rows import Prefixes, PromptTable, check_context
from softprompt.errors import ConfigError
from softprompt.prompts import Prompt

_STATIC = ("static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked")
_SPECULATIVE = ("assistant_model", "prompt_lookup_num_tokens")
_PREPARE = "prepare_inputs_for_generation"


@torch.no_grad()
def generate_with_prompts(
    base: Base,
    prompts: Sequence[Prompt | None],
    kwargs: dict[str, Any],
    *,
    at: Sequence[int] | None = None,
    vocabulary: VirtualVocabulary | None = None,
) -> Any:
    """Call the model's ``generate`` with each row behind its prompt; sequences hold no virtual tokens.

    Args:
        base: The base.
        prompts: The prompt of each input row, None for none, ``[B]``.
        kwargs: What ``generate`` takes, the input under its name (``input_ids`` or
            ``inputs_embeds``); lengths count text tokens.
        at: Real tokens of each row before its virtual ones; None puts all in front.
        vocabulary: Hooks that are on the base's embeddings already; None makes and removes some.

    Raises:
        ConfigError: For arguments that do not go with the prompts.
        ContextOverflowError: If prompt, input and new tokens exceed the model's context.
    """
    batch = BatchPrompts.of(prompts, at=at)
    with batch.injected(base, vocabulary), _prepared(base, batch, kwargs) as prepared:
        return cast(Any, base.model).generate(**prepared)


@contextmanager
def _prepared(base: Base, prompts: BatchPrompts, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the checked arguments of ``generate``, whose passes are prompted inside the context."""
    if prompts.prefixes is not None:
        _check_prefixed(base, prompts.prefixes, kwargs)
    original = getattr(base.model, _PREPARE)
    if prompts.table is None:
        with own_passes() as announce:

            @wraps(original)
            def prepare(*args: Any, **given: Any) -> Any:
                announce()
                return cast(dict[str, Any], original(*args, **given))

            with _replaced(base.model, _PREPARE, prepare):
                yield kwargs
        return
    kwargs = _checked(base, prompts, kwargs)
    if base.is_encoder_decoder and prompts.input is not None:
        kwargs = _encoded(base, prompts.input, kwargs)
    if prompts.decoder is not None:
        steps = _decoder_steps(original, base.facts, prompts.decoder)
    elif prompts.input is not None and not base.is_encoder_decoder:
        steps = _Steps(base, prompts.input).prepare
    else:
        yield kwargs
        return
    with _replaced(base.model, _PREPARE, steps):
        yield kwargs


@contextmanager
def _replaced(model: PreTrainedModel, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let a public method of one model be another inside the context."""
    before = model.__dict__.get(name)
    model.__dict__[name] = method
    try:
        yield
    finally:
        del model.__dict__[name]
        if before is not None:
            model.__dict__[name] = before


class _Steps:
    """A ``prepare_inputs_for_generation`` that puts prompts into the first pass of a causal model."""

    def __init__(self, base: Base, prompts: PromptTable) -> None:
        self._model = base.model
        self._original: Callable[..., dict[str, Any]] = getattr(base.model, _PREPARE)
        self._prompts = prompts
        self._facts = base.facts
        self._first_pass: int | None = None  # text columns of the first pass, which holds the prompts

    def prepare(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Replace ``prepare_inputs_for_generation`` of a decoder."""
        prompts = self._prompts.repeated(input_ids.shape[0])
        seen = cached_tokens(kwargs)
        embeds = inputs_embeds if is_first_iteration and not seen else None
        whole = input_ids if embeds is None else embeds
        fed = whole.shape[1] if next_sequence_length is None else next_sequence_length
        if seen and is_first_iteration and next_sequence_length is not None:
            # transformers took the cached prompt for text when it counted what is new.
            fed += prompts.width
        starts = not seen and (is_first_iteration or next_sequence_length is None)
        text = seen - prompts.width + fed if seen else fed
        if not seen and not starts:  # a recurrent state, which does not say how much it has seen
            text = input_ids.shape[1]
        mask = attention_mask
        if mask is None:
            mask = torch.ones(input_ids.shape[0], text, dtype=torch.long, device=input_ids.device)
        if starts:
            self._first_pass = text
        layout = Layout.of(mask[:, :text], prompts, lead_limit=self._first_pass)
        ids = input_ids[:, -fed:]
        if embeds is not None:
            inputs_embeds = layout.embeds(embeds, prompts.table)
        elif starts:
            ids = layout.ids(ids, self._facts.vocabulary, self._facts.pad_id)
        if position_ids is not None:
            given = None if position_ids.shape[-1] != text else position_ids
            kwargs["position_ids"] = layout.positions(given)[..., -(prompts.width + text if starts else fed) :]
        for name in per_token(self._model, kwargs, (input_ids.shape[0], text)):
            kwargs[name] = layout.spread(kwargs[name], 0)
        found: dict[str, Any] = self._original(
            ids,
            next_sequence_length=None if starts else fed,
            attention_mask=layout.mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return found


def _decoder_steps(
    original: Callable[..., dict[str, Any]], facts: Facts, prompts: PromptTable
) -> Callable[..., dict[str, Any]]:
    """Return a ``prepare_inputs_for_generation`` that puts prompts before a seq2seq decoder's first ids.

    Raises:
        ConfigError: If the rows' prompts differ in length, which a decoder without padding does not support.
    """
    lengths = sorted(set(prompts.lengths.tolist()))
    if len(lengths) > 1:
        raise ConfigError(
            f"generate needs decoder prompts of one length in a batch, got {lengths}; "
            "generate for one length at a time"
        )

    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared = original(*args, **kwargs)
        ids, mask = prepared["decoder_input_ids"], prepared.get("decoder_attention_mask")
        layout = Layout.of(torch.ones_like(ids) if mask is None else mask, prompts.repeated(ids.shape[0]))
        if mask is not None:  # it has the text's columns at every step
            prepared["decoder_attention_mask"] = layout.mask
        if not cached_tokens(prepared):
            prepared["decoder_input_ids"] = layout.ids(ids, facts.vocabulary, facts.pad_id)
        return prepared

    return prepare


def _encoded(base: Base, prompts: PromptTable, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the encoder on the prompted input, so that ``generate`` only decodes.

    ``input_ids`` stay the caller's: the encoder's logits processors see the text alone.
    """
    kwargs = dict(kwargs)
    ids, embeds, mask = (kwargs.get(n) for n in ("input_ids", "inputs_embeds", "attention_mask"))
    done = kwargs.get("encoder_outputs")
    whole = ids if ids is not None else embeds
    if mask is None and whole is not None:
        mask = _text_mask(whole, base.model.generation_config)
    if mask is None:
        return kwargs
    layout = Layout.of(mask, prompts, compact=True)
    if done is None:
        seen = layout.mask if prompts.sees_input else layout.isolated(base.dtype)
        inputs: dict[str, Any] = {"attention_mask": seen, "return_dict": True}
        if ids is not None:
            inputs["input_ids"] = layout.ids(ids, base.facts.vocabulary, base.facts.pad_id)
        else:
            inputs["inputs_embeds"] = layout.embeds(kwargs.pop("inputs_embeds"), prompts.table)
        kwargs["encoder_outputs"] = base.model.get_encoder()(**inputs)
        kwargs["attention_mask"] = layout.mask
    elif done[0].shape[1] == layout.mask.shape[1]:
        kwargs["attention_mask"] = layout.mask
    return kwargs


def _text_mask(tokens: Tensor, config: GenerationConfig) -> Tensor:
    """Infer a mask as transformers does: padding counts only where it cannot be an ending."""
    pad, eos = config.pad_token_id, config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    if tokens.dim() == 2 and pad is not None and pad not in ends:
        return tokens.ne(pad).long()
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def check_token_ids(ids: Tensor | None, vocabulary: int) -> None:
    """Refuse ids that are no token of the base: from V on they would silently mean virtual tokens.

    Raises:
        ConfigError: If there is one.
    """
    if ids is None or not ids.numel():
        return
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ConfigError(
            f"input_ids hold {largest:,}, but the base has {vocabulary:,} tokens; "
            "use the tokenizer that belongs to it"
        )


def _checked(base: Base, prompts: BatchPrompts, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate`` behind virtual tokens, checked against the context.

    Raises:
        ConfigError: For ids that are no token of the base, and options that do not go with the prompts.
        ContextOverflowError: If prompt, input and new tokens do not fit.
    """
    config: GenerationConfig = kwargs.get("generation_config") or base.model.generation_config
    _check_speculation(base, config, kwargs)
    if cached_tokens(kwargs) and kwargs.get("prefill_chunk_size"):
        raise ConfigError("prefill_chunk_size does not go with a filled cache; leave one out")
    check_token_ids(kwargs.get("input_ids"), base.facts.vocabulary)
    width, tokens = _text_size(kwargs)
    new = _new_tokens(config, kwargs, width)
    static = kwargs.get("cache_implementation", config.cache_implementation) in _STATIC
    virtual = prompts.input.width if prompts.input is not None else 0
    if base.is_encoder_decoder:
        before = prompts.decoder.width if prompts.decoder is not None else 0
        if before and static:
            raise ConfigError("a static cache does not go with a decoder prompt; leave it out")
        check_context(tokens, virtual, base.facts.context_length)
        check_context(0, before, output_limit(base.model), new=new, what="decoder")
        return kwargs
    inside = prompts.input is not None and bool(prompts.input.at.any())
    if inside and kwargs.get("prefill_chunk_size"):
        raise ConfigError("prefill_chunk_size needs placement prefix; leave one of the two out")
    check_context(tokens, virtual, base.facts.context_length, new=new)
    if static:
        given = kwargs.get("max_cache_len", config.max_cache_len) or 0
        return kwargs | {"max_cache_len": max(given, virtual + width + new)}
    return kwargs


def _check_prefixed(base: Base, prefixes: Prefixes, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of ``generate`` that would be misread behind prefixes.

    Raises:
        ConfigError: For static caches, and a filled cache where prefixes stand in it.
        ContextOverflowError: If prefix, input and new tokens do not fit.
    """
    config: GenerationConfig = kwargs.get("generation_config") or base.model.generation_config
    _check_speculation(base, config, kwargs)
    if kwargs.get("cache_implementation", config.cache_implementation) in _STATIC:
        raise ConfigError(
            "a static cache has its masks made before the layers see the prefix; leave cache_implementation out"
        )
    if cached_tokens(kwargs) and not prefix_path(base).in_attention:
        raise ConfigError(
            f"{base.facts.architecture} keeps its prefix in the cache, which generate would count as text; leave "
            "the filled one out"
        )
    check_token_ids(kwargs.get("input_ids"), base.facts.vocabulary)
    width, tokens = _text_size(kwargs)
    new = _new_tokens(config, kwargs, width)
    if base.is_encoder_decoder:
        check_context(tokens, 0, base.facts.context_length)
        check_context(0, prefixes.width, output_limit(base.model), new=new, what="decoder")
    else:
        check_context(tokens, prefixes.width, base.facts.context_length, new=new)


def _check_speculation(base: Base, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Refuse speculation but on decoders: drafts are made of the text alone, and checked behind the prompt."""
    for name in (*(_SPECULATIVE if base.is_encoder_decoder else ()), "assistant_early_exit"):
        if kwargs.get(name, getattr(config, name, None)) is not None:
            raise ConfigError(f"{name} does not work with soft prompts on {base.facts.architecture}; leave it out")


def _text_size(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Return the columns of the input, and the real tokens of its longest row."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            width = int(kwargs[name].shape[1])
            mask = kwargs.get("attention_mask")
            return width, int(mask.sum(-1).max()) if mask is not None and mask.dim() == 2 else width
    return 0, 0


def _new_tokens(config: GenerationConfig, kwargs: dict[str, Any], width: int) -> int:
    """Return how many tokens the call may add; 20 is transformers' default."""
    new = kwargs.get("max_new_tokens", config.max_new_tokens)
    if new is not None:
        return int(new)
    length = kwargs.get("max_length", config.max_length)
    return max(1, int(length) - width) if length is not None else 20
