"""What is kept for each model: its lock, what was read and found, the embeddings and the cache it is known by."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, TypeVar, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from softprompt.errors import BackboneError

T = TypeVar("T")
Lock = AbstractContextManager[Any]
_CACHES = ("cache", "past_key_values")
"""What transformers calls a cache since 5.24, and before; a model's own code, or a caller, may still say that."""


@final
class ModelState:
    """What is remembered of one model.

    Attributes:
        found: What probes found, by name. No value may hold the model, which would then never be freed.
        lock: The model's lock, once a pass needed it.
    """

    __slots__ = ("_kept", "found", "lock")

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.lock: Lock | None = None
        self._kept: dict[str, tuple[object, Any]] = {}

    def once(self, name: str, read: Callable[[], T], stamp: object = None) -> T:
        """Return what ``read`` returned first; it is called again when ``stamp`` is another one."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != stamp:
            kept = self._kept[name] = stamp, read()
        return cast(T, kept[1])


# Kept beside the models, never on them: a lock can be neither copied nor pickled.
_states: WeakKeyDictionary[nn.Module, ModelState] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()
"""By embedding, for models that share nothing else."""

_guard = threading.Lock()


def state_of(model: PreTrainedModel) -> ModelState:
    """Return what is remembered of a model; a copy of the model starts afresh."""
    with _guard:
        state = _states.get(model)
        return _states.setdefault(model, ModelState()) if state is None else state


def stamp_of(weight: Tensor) -> tuple[object, ...]:
    """Return a value that is another one after a weight was written to, replaced, moved or converted.

    Microseconds, and no byte of the weight is read: a write through ``weight.data`` leaves no trace.
    """
    version = 0 if weight.is_inference() else weight._version
    try:
        # Unlike a bare address, it cannot come back while the stamp is kept.
        storage: object = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # a quantised subclass that has no storage of its own
        storage = id(weight)
    return storage, version, weight.dtype, weight.device, weight.shape


def locked(model: PreTrainedModel) -> Lock:
    """Return the lock of a model, for ``with``; a task model, its parts and all that share them have one.

    While torch.compile traces there is none: a lock cannot be part of a graph.

    Raises:
        BackboneError: If the model has no input embedding.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    with _guard:
        state = _states.get(model)
        return state.lock if state is not None and state.lock is not None else _locked(model)


def resting(model: PreTrainedModel) -> Lock:
    """Return a context in which weights stay as they are: an offloaded model's come and go with every pass."""
    return locked(model) if hasattr(model, "_hf_hook") else nullcontext()


def _locked(model: PreTrainedModel) -> Lock:
    """Find or make the lock of a model and its parts, once; its embedding may be replaced later."""
    parts = [model, *(part for part in model.modules() if isinstance(part, PreTrainedModel))]
    states = [_states.setdefault(part, ModelState()) for part in parts]
    lock = _locks.setdefault(input_embedding(model), threading.RLock())
    lock = next((state.lock for state in states if state.lock is not None), lock)
    for state in states:
        state.lock = state.lock or lock
    return lock


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device that a model takes its inputs on; an offloaded weight is on none ("meta")."""
    if model.device.type != "meta":
        return model.device
    place = getattr(getattr(input_embedding(model), "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if place is None else place)


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Tell whether the model has an encoder and a decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Return the module that embeds the ids a prompt stands before (the encoder's, where there is one).

    Raises:
        BackboneError: If the model has none.
    """
    owner = model.get_encoder() if is_encoder_decoder(model) else model
    try:
        table = cast(PreTrainedModel, owner).get_input_embeddings()
    except NotImplementedError:
        table = None
    if table is None or not isinstance(getattr(table, "weight", None), Tensor):
        raise BackboneError(
            f"{type(model).__name__} has no input embedding table, so no prompt can stand before its input; "
            "use a text model"
        )
    return cast(nn.Embedding, _looked_up(model, cast(nn.Embedding, table)))


def _looked_up(model: PreTrainedModel, table: nn.Embedding) -> nn.Module:
    """Return the module a table's ids go through: T5 without its decoder has a twin that is never run."""
    encoder = model.get_encoder()
    if isinstance(encoder, PreTrainedModel):
        inner = encoder.get_input_embeddings()
        if getattr(inner, "weight", None) is table.weight:
            return inner
    return table


def decoder_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Return the module in which the decoder of a seq2seq model looks ids up; the encoder's may be another."""
    decoder = cast(Any, model).get_decoder()
    return cast(nn.Embedding, decoder.get_input_embeddings())


def side_embeddings(model: PreTrainedModel) -> list[nn.Embedding]:
    """Return further tables that are looked up with the input ids: Gemma's per-layer embeddings."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith("embed_tokens_per_layer") and isinstance(module, nn.Embedding)
    ]


def _known(names: Container[str]) -> list[str]:
    return [name for name in _CACHES if name in names]


def takes_cache(model: nn.Module) -> bool:
    """Tell whether a model's ``forward`` names a cache of keys and values, as decoders' do."""
    return bool(_known(inspect.signature(model.forward).parameters))


def with_cache(model: nn.Module, inputs: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """Return the arguments of a call with this cache; a forward that names none may hand on all it gets."""
    name, *_ = _known(inspect.signature(model.forward).parameters) or _known(vars(BaseModelOutputWithPast))
    return {each: value for each, value in inputs.items() if each not in _CACHES} | {name: cache}


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, or in what it returned; None where there is none."""
    return next((value for name, value in values.items() if name in _CACHES and value is not None), None)


def without_cache(output: Any) -> Any:
    """Return what a model returned, but the cache."""
    return replace(output, **dict.fromkeys(_known([each.name for each in fields(output)])))


def cached_tokens(values: Mapping[str, Any]) -> int:
    """Return how many tokens the cache of a call holds; recurrent states alone do not say, and count as 0."""
    cache = cache_in(values)
    if not isinstance(cache, Cache):
        return 0
    own = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder's own has no layers before 5.23
    return 0 if all(own.is_linear) else int(cache.get_seq_length())
