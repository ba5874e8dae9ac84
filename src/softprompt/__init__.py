"""Prompt tuning for frozen Hugging Face models: train, evaluate, inspect and use soft prompts.

``__init__.pyi`` lists the public names. They are imported when they are first used, so that
``import softprompt`` and ``softprompt --help`` do not wait for torch.
"""

from typing import Any as _Any

import lazy_loader as _lazy_loader

_found, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """Import a public name from the module that defines it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _found(name)
