"""The name that transformers gives a model's cache, and what the installed PEFT needs, which knows an older one."""

from __future__ import annotations

import inspect
from functools import wraps
from importlib import import_module

from transformers.modeling_outputs import CausalLMOutputWithPast

OLDER = "past_key_values"
CACHE = "cache" if "cache" in vars(CausalLMOutputWithPast) else OLDER


def let_peft_find_it() -> None:
    """Let bases take their cache by the older name once PEFT has them, and prepare it under that.

    PEFT 0.21.2 looks for no other name; each step of its ``generate`` would get the prompt again.
    """
    peft = import_module("peft")
    init = peft.PeftModel.__init__

    @wraps(init)
    def adapted(self, model, *args, **kwargs):
        init(self, _as_it_was(model), *args, **kwargs)

    peft.PeftModel.__init__ = adapted


def _as_it_was(model):
    for part in {model, getattr(model, "base_model", model)}:
        part.forward = _renamed(part.forward)
    if hasattr(model, "prepare_inputs_for_generation"):
        prepare = model.prepare_inputs_for_generation

        @wraps(prepare)
        def prepared(*args, **kwargs):
            return {OLDER if name == CACHE else name: value for name, value in prepare(*args, **kwargs).items()}

        model.prepare_inputs_for_generation = prepared
    return model


def _renamed(forward):
    @wraps(forward)
    def run(*args, **kwargs):
        return forward(*args, **{CACHE if name == OLDER else name: value for name, value in kwargs.items()})

    taken = inspect.signature(forward)
    parameters = [each.replace(name=OLDER) if each.name == CACHE else each for each in taken.parameters.values()]
    run.__signature__ = taken.replace(parameters=parameters)
    return run
