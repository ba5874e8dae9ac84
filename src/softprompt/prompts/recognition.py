"""How libraries that ask for PEFT's classes recognise ours: transformers' Trainer, accelerate and TRL.

They ask ``isinstance(x, peft.PeftModel)``, which falls back on ``x.__class__``. Where somebody has imported
``peft``, that is a class derived from ours and from PEFT's of the same name. It is never instantiated:
``type(x)`` stays ours, and no code of PEFT's runs. Nothing here imports ``peft``.
"""

from __future__ import annotations

import functools
import sys
import types
from importlib import import_module
from typing import Any


class KnownToPeft:
    """Makes instances pass for those of PEFT's class of the same name, where ``peft`` is imported."""

    __slots__ = ()

    @property
    def __class__(self) -> type:
        """The class that ``isinstance`` sees beside ``type(self)``."""
        return _seen_class(type(self))

    @__class__.setter
    def __class__(self, value: type) -> None:  # nothing assigns it; a type checker wants the pair
        object.__setattr__(self, "__class__", value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the type that it is: pickle compares the class it finds with ``__class__``."""
        reduced: Any = object.__reduce_ex__(self, max(2, protocol))
        return _bare, reduced[1][:1], *reduced[2:]


def _bare(cls: Any) -> Any:
    """Return an instance to be filled by unpickling."""
    return cls.__new__(cls)


def _seen_class(own: type) -> type:
    """Return the class under which an instance of ``own`` is recognised."""
    peft = sys.modules.get("peft")
    if peft is None:
        return own
    for cls in own.__mro__:
        theirs = getattr(peft, cls.__name__, None) if cls.__module__.startswith("softprompt.") else None
        if isinstance(theirs, type):
            # Where this package is served under PEFT's name, PEFT's class is ours.
            return own if issubclass(own, theirs) else _joint_class(own, theirs)  # type: ignore[arg-type]
    return own


@functools.cache
def _joint_class(own: type, theirs: type) -> type:
    """Return a class derived from both whose call makes an ``own``, as ``dataclasses.replace`` calls it."""
    _join_registry()

    def made(cls: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    body = {"__new__": made, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return types.new_class(own.__name__, (own, theirs), exec_body=lambda names: names.update(body))


@functools.cache
def _join_registry() -> None:
    """Let ``peft.get_peft_model`` attach our configurations by us, PEFT's own by PEFT as before.

    TRL's ``SFTTrainer(peft_config=...)`` calls it. It looks the class of a task up in a table; whoever holds
    the function holds the table, so it does not matter who imported what first.
    """
    registry: dict[str, type] = sys.modules["peft"].MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    registry.update({task: _either(theirs) for task, theirs in registry.items()})


def _either(theirs: type) -> type:
    """Return a class that stands for PEFT's class of a task and makes ours for one of our configurations."""

    def made(cls: type, model: Any, peft_config: Any, adapter_name: str = "default", **options: Any) -> Any:
        if issubclass(type(peft_config), KnownToPeft):
            # By name: the interface lies above this folder.
            return import_module("softprompt.peft").get_peft_model(model, peft_config, adapter_name)
        return theirs(model, peft_config, adapter_name, **options)

    body = {"__new__": made, "__module__": theirs.__module__, "__qualname__": theirs.__qualname__}
    return types.new_class(theirs.__name__, (theirs,), exec_body=lambda names: names.update(body))
