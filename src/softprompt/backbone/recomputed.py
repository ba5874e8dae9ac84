"""Layers that backward runs again (gradient checkpointing), under the attention of their pass.

Which attention a layer runs is looked up in the config, at that moment; which product its linear
layers run, in the layers. So each call that a checkpoint keeps for backward sets both itself and
puts them back, whatever happens in between: nothing is left behind by a backward that fails, or
that never runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.backbone.attention import Implementations, implementations_of, switched
from softprompt.backbone.products import FrozenLinear, bodies_in, swapped_forwards
from softprompt.backbone.state import locked

_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps the function that runs a layer and remembers how to run it again."""


def recomputes_layers(model: nn.Module) -> bool:
    """Tell whether backward will run layers of the model again (gradient checkpointing, in training)."""
    return model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


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
            with locked(model), switched(implementations), swapped_forwards(bodies):
                return layer(*inputs, **options)

        return checkpoint(again, *args, **kwargs)

    # Whether backward is reentrant is read from the function's keywords, in a pass inside a pass too.
    cast(Any, run).keywords = getattr(checkpoint, "keywords", {})
    return run
