"""``import softprompt.as_peft`` serves this package under the name ``peft``, where PEFT is not installed.

transformers' Trainer, accelerate and TRL save, resume and restore adapters for models they recognise by PEFT's
classes. Where PEFT is installed ours pass for them (``prompts/recognition.py``), and this import changes nothing.
It comes before the libraries that look for PEFT.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any, final

from softprompt.errors import ConfigError

VERSION = "0.21.2"
"""The version of PEFT whose interface is followed."""

_LATE = ("transformers.trainer_utils", "trl.trainer.utils", "peft")
"""Modules that have looked for PEFT when they are imported."""


class _Missing:
    """Stands for a class of PEFT that has no counterpart here: nothing is an instance of it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            f"{type(self).__name__} is PEFT's, and softprompt, which is served in its place, has prompts alone; "
            "install peft, and leave softprompt.as_peft out"
        )


class _Served(ModuleType):
    """A module named as PEFT's whose classes and functions are ours."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return VERSION
        if name.startswith("__"):
            raise AttributeError(name)
        ours = importlib.import_module("softprompt")
        if name in ours.__all__:
            return getattr(ours, name)
        if not name[0].isupper():
            raise AttributeError(f"softprompt, served as {self.__name__}, has no {name}")
        found = type(name, (_Missing,), {"__module__": self.__name__})
        setattr(self, name, found)  # one class for one name
        return found

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuse to be a function of a module that PEFT has and softprompt has not."""
        raise ConfigError(
            f"softprompt, served as peft, has no {self.__name__}; transformers' from_pretrained and load_adapter "
            "load no prompts, of PEFT's neither: load them with softprompt.AutoPeftModelFor..., and pass the model"
        )


@final
class _Metadata(Distribution):
    """What ``importlib.metadata`` says of the served package: accelerate takes no package without it."""

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: peft\nVersion: {VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return path


@final
class _Finder(DistributionFinder, Loader):
    """Finds ``peft`` and what is below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == "peft" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Served(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: names are looked up when they are used."""

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        return [_Metadata()] if getattr(context, "name", None) == "peft" else []


def _serve() -> None:
    """Serve this package as ``peft``.

    Raises:
        ConfigError: If a library has already looked for PEFT.
    """
    late = [name for name in _LATE if name in sys.modules]
    if late:
        raise ConfigError(
            f"{late[0]} has looked for PEFT already; put `import softprompt.as_peft` before all other imports"
        )
    sys.meta_path.append(_Finder())
    looked = sys.modules.get("transformers.utils.import_utils")
    if looked is not None:
        looked.is_peft_available.cache_clear()


if find_spec("peft") is None:
    _serve()
