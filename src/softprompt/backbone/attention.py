"""Switching the attention implementation of a model and its parts, and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from softprompt.backbone.state import locked, state_of
from softprompt.errors import BackboneError

Implementations = Sequence[tuple[PreTrainedConfig, str]]
"""Configs of a model, each with the name of the attention implementation that its layers look up."""


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


def switch(implementations: Implementations) -> None:
    """Set the attention implementation of each config, without transformers' checks and messages."""
    for config, name in implementations:
        config._attn_implementation_internal = name


@contextmanager
def switched(implementations: Implementations) -> Iterator[None]:
    """Set attention implementations inside the context, and put back what stood there before."""
    before = [(config, config._attn_implementation) for config, _ in implementations]
    switch(implementations)
    try:
        yield
    finally:
        switch(before)


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
            raise BackboneError(
                f"{type(model).__name__} does not honour transformers' attention interface"
            )
        return [each for each in implementations_of(model) if each[1] == name]
