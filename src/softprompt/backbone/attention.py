"""Switching the attention implementation of a model and its parts, and back.

Which attention a layer runs is looked up in the config at that moment; which product its linear
layers run, in the layers. So a layer that backward runs again (gradient checkpointing) sets both
itself, as they were in its pass, and puts back what it found, whatever happened in between: nothing
is left behind by a backward that fails, or that never runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from softprompt.backbone.products import FrozenLinear, products_in, swapped_forwards
from softprompt.backbone.state import locked, state_of
from softprompt.errors import BackboneError

Implementations = Sequence[tuple[PreTrainedConfig, str]]
"""Configs of a model, each with the name of the attention implementation that its layers look up."""

_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps the function that runs a layer and remembers how to run it again."""


def implementations_of(model: PreTrainedModel) -> Implementations:
    """Return the attention implementation of every config in a model; parts may have their own."""
    left = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found: dict[int, PreTrainedConfig] = {}
    while left:
        config = left.pop()
        if id(config) not in found:
            found[id(config)] = config
            below = [getattr(config, name, None) for name in config.sub_configs]
            left += [each for each in below if each is not None]
    return [(config, config._attn_implementation) for config in found.values()]


def _switch(implementations: Implementations) -> None:
    """Set the attention implementation of each config, without transformers' checks and messages."""
    for config, name in implementations:
        config._attn_implementation_internal = name


@contextmanager
def switched(implementations: Implementations) -> Iterator[None]:
    """Set attention implementations inside the context, and put back what stood there before."""
    before = [(config, config._attn_implementation) for config, _ in implementations]
    _switch(implementations)
    try:
        yield
    finally:
        _switch(before)


def supported(model: PreTrainedModel, name: str) -> Implementations:
    """Return what runs a model's layers on an attention implementation, for ``switched``.

    transformers' own checks are run the first time and the result is kept, so that a pass walks no
    modules. Nothing is switched afterwards.

    Raises:
        BackboneError: If the model does not honour the attention interface.
    """
    # The kept configs hold this one too, so its id is no other config's.
    return state_of(model).once(f"attention {name}", lambda: _set(model, name), id(model.config))


def _set(model: PreTrainedModel, name: str) -> Implementations:
    verbosity = hf_logging.get_verbosity()
    with locked(model), switched(implementations_of(model)):
        hf_logging.set_verbosity(logging.ERROR)
        try:
            model.set_attn_implementation(name)
        finally:
            hf_logging.set_verbosity(verbosity)
        if model.config._attn_implementation != name:
            raise BackboneError(f"{type(model).__name__} does not honour transformers' attention interface")
        # Towers (a vision model beside the language model) keep their own.
        text = model.config.get_text_config()
        beside = () if text is model.config else [getattr(model.config, n, None) for n in model.config.sub_configs]
        towers = [id(config) for config in beside if config is not text]
        return [each for each in implementations_of(model) if each[1] == name and id(each[0]) not in towers]


def recomputes_layers(model: nn.Module) -> bool:
    """Tell whether backward will run layers of the model again (gradient checkpointing, in training)."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def recomputed_alike(model: PreTrainedModel) -> Iterator[None]:
    """Let layers checkpointed inside the context be run again with the attention and products they have now.

    The model's lock is held while a layer is run again, in whatever thread that is; so never run
    backward while holding it.
    """
    if torch.compiler.is_compiling() or not recomputes_layers(model):
        yield
        return
    implementations, products = implementations_of(model), products_in(model)
    changed: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        if _CHECKPOINT in vars(module):
            original = vars(module)[_CHECKPOINT]
            changed.append((module, original))
            setattr(module, _CHECKPOINT, _alike(original, model, implementations, products))
    try:
        yield
    finally:
        for module, original in changed:
            setattr(module, _CHECKPOINT, original)


def _alike(
    checkpoint: Callable[..., Any],
    model: PreTrainedModel,
    implementations: Implementations,
    products: Sequence[FrozenLinear],
) -> Callable[..., Any]:
    def run(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def again(*inputs: Any, **options: Any) -> Any:
            with locked(model), switched(implementations), swapped_forwards(products):
                return layer(*inputs, **options)

        return checkpoint(again, *args, **kwargs)

    # Whether backward is reentrant is read from the function's keywords, in a pass inside a pass too.
    cast(Any, run).keywords = getattr(checkpoint, "keywords", {})
    return run
