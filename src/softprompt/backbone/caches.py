"""By which name models take and return their cache: ``cache`` since transformers 5.24, ``past_key_values`` before.

A model's own code, or a caller, may still use the older name; nothing else here knows either.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

_NAMES = ("cache", "past_key_values")


def _known(names: Container[str]) -> list[str]:
    return [name for name in _NAMES if name in names]


def takes_cache(model: nn.Module) -> bool:
    """Tell whether a model's ``forward`` names a cache of keys and values, as decoders' do."""
    return bool(_known(inspect.signature(model.forward).parameters))


def with_cache(model: nn.Module, inputs: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """Return the arguments of a call with this cache; a forward that names none may hand on all it gets."""
    name, *_ = _known(inspect.signature(model.forward).parameters) or _known(vars(BaseModelOutputWithPast))
    return {each: value for each, value in inputs.items() if each not in _NAMES} | {name: cache}


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, or in what it returned; None where there is none."""
    return next((value for name, value in values.items() if name in _NAMES and value is not None), None)


def without_cache(output: Any) -> Any:
    """Return what a model returned, but the cache."""
    return replace(output, **dict.fromkeys(_known([each.name for each in fields(output)])))


def cached_tokens(values: Mapping[str, Any]) -> int:
    """Return how many tokens the cache of a call holds; recurrent states alone do not say, and count as 0."""
    cache = cache_in(values)
    return int(cache.get_seq_length()) if isinstance(cache, Cache) and not all(cache.is_linear) else 0
