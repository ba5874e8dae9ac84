"""Layers that backward runs again (gradient checkpointing), under the attention of their pass.

Which attention a layer runs is looked up in the config, at that moment; which product its linear
layers run, in the layers. So each call that a checkpoint keeps for backward sets both itself and
puts them back, whatever happens in between: nothing is left behind by a backward that fails, or
that never comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from softprompt.backbone import recomputes_layers
from softprompt.engine.lock import locked
from softprompt.engine.products import FrozenLinear, bodies_in, lent_bodies

_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps the function that runs a layer and remembers how to run it again."""

Implementations = Sequence[tuple[PreTrainedConfig, str]]


@contextmanager
def recomputed_alike(model: PreTrainedModel) -> Iterator[None]:
    """Let layers checkpointed inside the context be run again with the attention and products they have now.

    The model's lock is held while a layer is run again, in whatever thread that is; so never run
    backward while holding it.
    """
    if torch.compiler.is_compiling() or not recomputes_layers(model):
        yield
        return
    implementations, bodies = implementations_of(model), bodies_in(model)
    changed: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        if _CHECKPOINT in vars(module):
            original = vars(module)[_CHECKPOINT]
            changed.append((module, original))
            setattr(module, _CHECKPOINT, _alike(original, model, implementations, bodies))
    try:
        yield
    finally:
        for module, original in changed:
            setattr(module, _CHECKPOINT, original)


def _alike(
    checkpoint: Callable[..., Any],
    model: PreTrainedModel,
    implementations: Implementations,
    bodies: Sequence[FrozenLinear],
) -> Callable[..., Any]:
    def run(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def again(*inputs: Any, **options: Any) -> Any:
            with locked(model), lent_bodies(bodies):
                before = [(config, config._attn_implementation) for config, _ in implementations]
                switch(implementations)
                try:
                    return layer(*inputs, **options)
                finally:
                    switch(before)

        return checkpoint(again, *args, **kwargs)

    return run


def switch(implementations: Implementations) -> None:
    """Set the attention implementation of each config, without transformers' checks and messages."""
    for config, name in implementations:
        config._attn_implementation_internal = name


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
