"""Choosing how a model is run behind prefixes: the first way that proves itself exact.

The oracle is a row alone behind a cache that holds its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from softprompt.backbone import Base, with_cache
from softprompt.engine import Drawn, Prefixes, difference, measured, pad_rows, remembered
from softprompt.engine.prefixes.passes import prefixed_attention, prefixed_cache, text_positions
from softprompt.errors import BackboneError
from softprompt.prompts import Prompt

_LENGTHS = (7, 4, 9)
_PREFIXES = (5, 3, 0)
"""Tokens of each probe row, and virtual tokens of its prefix."""

Way = Callable[[Base, Prefixes], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class PrefixPath:
    """How a model is run behind prefixes.

    Attributes:
        in_attention: Whether prefixes stand inside attention, rather than in the cache.
        counts_columns: Whether padding may not stand between prefix and text.
    """

    in_attention: bool
    counts_columns: bool = False


def prefixed(base: Base, prefixes: Prefixes) -> AbstractContextManager[None]:
    """Run every pass of the model in the context behind the rows' prefixes.

    Raises:
        BackboneError: If there is no exact way.
    """
    path = prefix_path(base)
    if path.in_attention:
        return prefixed_attention(base, prefixes)
    return prefixed_cache(base, prefixes, counts_columns=path.counts_columns)


def prefix_path(base: Base) -> PrefixPath:
    """Return the way a model is run behind prefixes; found by probes, once.

    Raises:
        BackboneError: If there is none.
    """
    _ = base.prefix_sources  # raises in words of its own
    problem = remembered(base, "prefixes in attention", lambda: _Probe(base).attention_problem())
    if not problem:
        return PrefixPath(in_attention=True)
    unread = remembered(base, "a prefix in a cache", lambda: _Probe(base).unread())
    if unread or base.is_encoder_decoder or base.prefix_sources is not None or _cache_problem(base, left=False):
        raise BackboneError(
            f"{base.facts.architecture} cannot be run behind a prefix ({unread or problem}); use PromptTuningConfig"
        )
    return PrefixPath(in_attention=False, counts_columns=bool(_cache_problem(base, left=True)))


def _cache_problem(base: Base, *, left: bool) -> str:
    side = "left" if left else "right"
    return remembered(
        base, f"prefixes in a cache, padded on the {side}", lambda: _Probe(base).cache_problem(left=left)
    )


@final
class _Probe:
    """Rows behind two prefixes and behind none, and their outputs."""

    def __init__(self, base: Base) -> None:
        """Draw the rows.

        Raises:
            BackboneError: If the base's layers keep more than keys and values.
        """
        drawn = Drawn(base)
        self._base = base
        self._prompts = [Prompt(prefix=drawn.keys_and_values(n)) if n else None for n in _PREFIXES]
        self._rows = [drawn.tokens(n) for n in _LENGTHS]

    @torch.no_grad()
    def unread(self) -> str:
        """Return which layer does not read a prefix in a cache, empty where all do."""
        return self._unread(lambda: self._alone(0))

    @torch.no_grad()
    def attention_problem(self) -> str:
        """Return why prefixes cannot stand inside the model's attention, empty when they can."""
        base = self._base
        if getattr(base.model.config.get_text_config(), "attn_temperature_tuning", False):
            return "it scales attention by column"  # Llama 4; a probe is too short to see it
        if not remembered(base, "a prefix in a cache", self.unread):
            expected = self._cached_alone
        elif base.facts.takes_cache or not base.facts.accepts_position_ids:
            return "it has no cache of keys and values, and takes no position_ids"
        else:  # an encoder: one row alone, each layer of which reads the prefix
            expected = self._encoded_alone
            unread = self._unread(lambda: self._run(prefixed_attention, [0]))
            if unread:
                return unread
        # A decoder of a seq2seq model counts columns, so its rows are padded on the right.
        sides = (False,) if base.is_encoder_decoder else (True, False)
        found = (self._difference(prefixed_attention, measured(base, expected), left=left) for left in sides)
        return next(filter(None, found), "")

    @torch.no_grad()
    def cache_problem(self, *, left: bool) -> str:
        """Return why prefixes cannot be the first columns of a cache, empty when they can."""
        return self._difference(prefixed_cache, measured(self._base, self._cached_alone), left=left)

    def _unread(self, run: Callable[[], Tensor]) -> str:
        """Return which layer does not read the first row's prefix, empty when all do."""
        prompt = self._prompts[0]
        assert prompt is not None, "the first row has a prefix"
        (value,) = prompt.tensors
        value.requires_grad_()
        try:
            with torch.enable_grad():
                outputs = run()
                # From 1 on: a single output must not weigh sin(0).
                weights = torch.arange(1, outputs.numel() + 1, device=outputs.device).sin()
                total = (outputs * weights.view_as(outputs)).sum()
                gradient = torch.zeros_like(value)
                if total.requires_grad:
                    (gradient,) = torch.autograd.grad(total, value, materialize_grads=True)
        finally:
            value.requires_grad_(False)
        read = self._base.prefix_sources or range(len(gradient))
        silent = [i for i, layer in enumerate(gradient) if i in read and not bool(layer.any())]
        # A base may stop the gradient and read the prefix all the same, which is enough to answer behind it.
        silent = [i for i in silent if not _moves(run, value[i])]
        return f"layer {silent[0]} does not read its prefix" if silent else ""

    def _difference(self, way: Way, trusted: tuple[Tensor, Tensor], *, left: bool) -> str:
        expected, moved = trusted
        pooled = expected.shape[0] == 2
        if pooled:  # a batch would need a padding token
            got = torch.cat([self._run(way, [row]) for row in (0, 1)])
        else:
            got = self._run(way, [0, 1, 2], left=left)[: expected.shape[0]]
        if got.shape != expected.shape:
            return f"its outputs have shape {list(got.shape)}"
        return difference("outputs", got, expected, moved)

    def _run(self, way: Way, rows: Sequence[int], *, left: bool = False) -> Tensor:
        """Return the outputs of rows run together one way, those of real tokens one after another."""
        base = self._base
        ids, mask = pad_rows([self._rows[i] for i in rows], left=left, pad_id=base.facts.pad_id)
        mask = mask.to(base.device)
        inputs = self._inputs(ids.to(base.device), mask)
        prefixes = Prefixes.of([self._prompts[row] for row in rows])
        assert prefixes is not None, "no row of the probe has a prefix"
        with way(base, prefixes):
            output = base.model(**inputs, return_dict=True)
        return _picked(output, mask)

    def _encoded_alone(self) -> Tensor:
        return torch.cat([self._run(prefixed_attention, [row]) for row in (0, 1)])

    def _cached_alone(self) -> Tensor:
        return torch.cat([self._alone(0), self._alone(1)])

    def _alone(self, row: int) -> Tensor:
        """Return the outputs of a row alone, behind a cache filled by hand."""
        base, prompt = self._base, self._prompts[row]
        assert prompt is not None and prompt.prefix is not None, "the row has no prefix"
        ids = torch.tensor([self._rows[row]], device=base.device)
        cache = self._filled(prompt.prefix.to(base.dtype))
        mask = torch.ones_like(ids)
        inputs = self._inputs(ids, mask)
        if base.is_encoder_decoder:
            inputs = with_cache(base.model, inputs, EncoderDecoderCache(cache, DynamicCache()))
            del inputs["decoder_attention_mask"]
        else:
            count = prompt.prefix_tokens
            inputs = with_cache(base.model, inputs, cache)
            inputs["attention_mask"] = mask.new_ones(1, count + ids.shape[1])
            if base.facts.accepts_position_ids:
                seen = cache.get_seq_length()
                inputs["position_ids"] = text_positions(base.facts, {"input_ids": ids}) + seen
        return _picked(base.model(**inputs, use_cache=True, return_dict=True), mask)

    def _filled(self, prefix: Tensor) -> DynamicCache:
        """Return a cache of one row with its prefix ``[L, 2, A_kv, P, D]``, in the layers that read their own."""
        config, sources = self._base.model.config.get_text_config(), self._base.prefix_sources
        cache = DynamicCache() if sources is None else DynamicCache(config=config)
        for index, layer in enumerate(prefix):
            if sources is None:
                cache.update(layer[:1], layer[1:], index)
            elif sources[index] == index:
                own = config.per_layer_config[index]
                part = layer[:, : own.num_key_value_heads, :, : own.head_dim]
                cache.update(part[:1], part[1:], index)
        return cache

    def _inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._base.is_encoder_decoder:
            inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return inputs


def _picked(output: Any, mask: Tensor) -> Tensor:
    found: Tensor = next(v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point())
    if found.shape[:2] == mask.shape:
        return found[mask.bool()].float()
    return found.float()


def _moves(run: Callable[[], Tensor], values: Tensor) -> bool:
    """Return whether what a pass gives depends on values, by more than two passes on the same ones differ."""
    first, second = run(), run()
    kept = values.clone()
    values.mul_(-1)
    try:
        return bool((run() - first).abs().max() > (second - first).abs().max())
    finally:
        values.copy_(kept)
