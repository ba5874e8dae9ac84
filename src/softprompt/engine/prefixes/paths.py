"""Choosing how a model is run behind prefixes: the first way that proves itself exact.

The oracle is a row alone behind a cache that holds its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from softprompt.backbone import Base
from softprompt.engine.prefixes.passes import prefixed_attention, prefixed_cache, text_positions
from softprompt.engine.prefixes.values import Prefixes
from softprompt.engine.selfcheck import probing
from softprompt.errors import BackboneError
from softprompt.prompts import Prompt

_LENGTHS = (7, 4, 9)
_PREFIXES = (5, 3)
_CHOICE = (0, 1, None)
"""Prefix of each probe row."""

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class PrefixPath:
    """How a model is run behind prefixes.

    Attributes:
        in_attention: Whether prefixes stand inside attention, rather than in the cache.
        counts_columns: Whether padding may not stand between prefix and text.
        reason: Why not inside attention, empty when it is.
    """

    in_attention: bool
    counts_columns: bool = False
    reason: str = ""


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
    """Return the way a model is run behind prefixes; found by a probe and remembered.

    Raises:
        BackboneError: If there is none.
    """
    found, name = base.found, "prefixes"
    if name not in found:
        _ = base.key_value_shape  # raises where there are none
        with probing(base), torch.no_grad():
            found[name] = _found(_Probe.of(base))
    return cast(PrefixPath, found[name])


@dataclass(frozen=True, slots=True)
class _Probe:
    base: Base
    prompts: tuple[Prompt, ...]
    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, base: Base) -> _Probe:
        shape, device = base.key_value_shape, base.device
        generator = torch.Generator().manual_seed(0)
        values = (
            torch.randn(shape.layers, 2, shape.heads, n, shape.width, generator=generator)
            for n in _PREFIXES
        )
        prompts = tuple(Prompt(prefix=value.to(device)) for value in values)
        top = min(base.facts.vocabulary, 1000)
        rows = tuple(
            torch.randint(1, top, (1, n), generator=generator).to(device) for n in _LENGTHS
        )
        return cls(base, prompts, rows)

    def run(self, way: Any, rows: Sequence[int], *, left: bool = False, **options: Any) -> Tensor:
        """Return the outputs of rows run together one way, those of real tokens one after another."""
        ids, mask = self._batch([self.rows[row] for row in rows], left)
        inputs = self._inputs(ids, mask)
        prefixes = Prefixes.of([self._prompt(row) for row in rows])
        assert prefixes is not None, "no row of the probe has a prefix"
        with way(self.base, prefixes, **options):
            output = self.base.model(**inputs, return_dict=True)
        return _picked(output, mask)

    def alone(self, row: int) -> Tensor:
        """Return the outputs of a row alone, behind a cache filled by hand."""
        ids = self.rows[row]
        prompt = self._prompt(row)
        assert prompt is not None and prompt.prefix is not None, "the row has no prefix"
        count = prompt.prefix_tokens
        cache = DynamicCache()
        for index, layer in enumerate(prompt.prefix.to(self.base.dtype)):
            cache.update(layer[:1], layer[1:], index)
        mask = torch.ones_like(ids)
        inputs = self._inputs(ids, mask)
        if self.base.facts.is_encoder_decoder:
            inputs["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())
            del inputs["decoder_attention_mask"]
        else:
            inputs["past_key_values"] = cache
            inputs["attention_mask"] = torch.ones_like(ids[:, :1]).expand(1, count + ids.shape[1])
            if self.base.facts.accepts_position_ids:
                inputs["position_ids"] = text_positions(self.base.facts, {"input_ids": ids}) + count
        output = self.base.model(**inputs, use_cache=True, return_dict=True)
        return _picked(output, mask)

    def _prompt(self, row: int) -> Prompt | None:
        choice = _CHOICE[row]
        return None if choice is None else self.prompts[choice]

    def _inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.base.facts.is_encoder_decoder:
            inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return inputs

    def _batch(self, rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
        width = max(row.shape[1] for row in rows)
        ids = rows[0].new_full((len(rows), width), self.base.facts.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            n = row.shape[1]
            where = slice(width - n, width) if left else slice(0, n)
            ids[i, where], mask[i, where] = row[0], 1
        return ids, mask


def _picked(output: Any, mask: Tensor) -> Tensor:
    found: Tensor = next(
        v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point()
    )
    if found.shape[:2] == mask.shape:
        return found[mask.bool()].float()
    return found.float()


def _found(probe: _Probe) -> PrefixPath:
    try:
        expected: Tensor | None = torch.cat([probe.alone(0), probe.alone(1)])
        trouble = _unread(probe, lambda: probe.alone(0))
        expected = None if trouble else expected
    except Exception as cause:  # whatever a model's own code raises on a cache
        expected, trouble = None, _first_line(cause)
    problem = _problem(probe, expected)
    if not problem:
        return PrefixPath(in_attention=True)
    if expected is not None and not probe.base.facts.is_encoder_decoder:
        counts_columns = bool(_difference(probe, prefixed_cache, expected, left=True))
        if not _difference(probe, prefixed_cache, expected, left=False):
            return PrefixPath(False, counts_columns, problem)
    raise BackboneError(
        f"{probe.base.facts.architecture} cannot be run behind a prefix ({trouble or problem}); "
        "use PromptTuningConfig"
    )


def _unread(probe: _Probe, run: Callable[[], Tensor]) -> str:
    """Return which layer does not read its prefix, empty when all do."""
    (value,) = probe.prompts[0].tensors
    value.requires_grad_()
    try:
        with torch.enable_grad():
            outputs = run()
            weights = torch.arange(outputs.numel(), device=outputs.device).sin().view_as(outputs)
            (gradient,) = torch.autograd.grad(
                (outputs * weights).sum(), value, materialize_grads=True
            )
    finally:
        value.requires_grad_(False)
    silent = [i for i, layer in enumerate(gradient) if not bool(layer.any())]
    return f"layer {silent[0]} does not read its prefix" if silent else ""


def _problem(probe: _Probe, expected: Tensor | None) -> str:
    """Return why prefixes cannot stand inside the model's attention, empty when they can."""
    config = probe.base.model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False):
        return "it scales attention by column"  # Llama 4; a probe is too short to see it
    try:
        if expected is None:
            if probe.base.facts.takes_cache or not probe.base.facts.accepts_position_ids:
                return "it has no cache of keys and values, and takes no position_ids"
            expected = torch.cat([probe.run(prefixed_attention, [row]) for row in (0, 1)])
            unread = _unread(probe, lambda: probe.run(prefixed_attention, [0]))
            if unread:
                return unread
        # A decoder of a seq2seq model counts columns, so its rows are padded on the right.
        for left in (False,) if probe.base.facts.is_encoder_decoder else (True, False):
            problem = _difference(probe, prefixed_attention, expected, left=left)
            if problem:
                return problem
    except Exception as cause:  # whatever a model's own code raises on our masks
        return _first_line(cause)
    return ""


def _difference(probe: _Probe, way: Any, expected: Tensor, *, left: bool) -> str:
    pooled = expected.shape[0] == len(_PREFIXES)
    try:
        if pooled:  # a batch would need a padding token
            got = torch.cat([probe.run(way, [row]) for row in (0, 1)])
        else:
            got = probe.run(way, [0, 1, 2], left=left)[: expected.shape[0]]
    except Exception as cause:  # whatever a model's own code raises on our inputs
        return _first_line(cause)
    if got.shape != expected.shape:
        return f"its outputs have shape {list(got.shape)}"
    worst = float((got - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    allowed = _TOLERANCE.get(probe.base.dtype, 1e-4) * scale
    return "" if worst <= allowed else f"its outputs differ by {worst:.2g} on the probe"


def _first_line(cause: Exception) -> str:
    line = (str(cause).strip().splitlines() or [""])[0]
    return line[:120] or type(cause).__name__
