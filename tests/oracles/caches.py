"""The name that transformers gives a model's cache, and what the installed PEFT needs, which knows an older one."""

from __future__ import annotations

import inspect
from functools import wraps

from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

OLDER = "past_key_values"
CACHE = "cache" if "cache" in vars(CausalLMOutputWithPast) else OLDER


def as_peft_knows(model: PreTrainedModel) -> PreTrainedModel:
    """Let a base take its cache by the older name too, and prepare it under that: PEFT 0.21.2 looks for no other.

    Without it each step of its ``generate`` gets the prompt again, behind the cache of the last.
    """
    if CACHE == OLDER:
        return model
    forward, prepare = model.forward, getattr(model, "prepare_inputs_for_generation", None)

    @wraps(forward)
    def run(*args, **kwargs):
        return forward(*args, **{CACHE if name == OLDER else name: value for name, value in kwargs.items()})

    taken = inspect.signature(forward)
    parameters = [each.replace(name=OLDER) if each.name == CACHE else each for each in taken.parameters.values()]
    run.__signature__ = taken.replace(parameters=parameters)
    model.forward = run
    if prepare is not None:

        @wraps(prepare)
        def prepared(*args, **kwargs):
            return {OLDER if name == CACHE else name: value for name, value in prepare(*args, **kwargs).items()}

        model.prepare_inputs_for_generation = prepared
    return model
