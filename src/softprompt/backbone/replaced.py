"""Modules of the base that have trained copies (PEFT's ``modules_to_save``): finding, naming and running them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from softprompt.backbone.base import Base
from softprompt.errors import ConfigError

HEAD = "base_model."
"""What PEFT puts before the path of a trained module's parameters in a file."""


@contextmanager
def replaced_modules(base: Base, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run these modules in place of the base's own inside the context, which holds the base's lock.

    A module of another dtype, as trained copies of a bfloat16 base are, computes in its own.

    Args:
        base: The base; afterwards it has its own modules again.
        modules: Replacements by the path of the module they stand for, such as ``{"lm_head": head}``.

    Raises:
        ConfigError: If the base has no module at a path.
    """
    if not modules:
        yield
        return
    with base.lock:
        originals = {path: _module_at(base, path) for path in modules}
        try:
            for path, module in modules.items():
                set_module(base.model, path, _OwnDtype(module))
            yield
        finally:
            for path, original in originals.items():
                set_module(base.model, path, original)


def in_own_dtype(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module on inputs of another dtype: it computes in its own, its output has the input's."""
    computed = next(module.parameters()).dtype
    given = args[0].dtype
    if torch.is_autocast_enabled(args[0].device.type) or computed == given:
        return module(*args, **kwargs)
    return module(args[0].to(computed), *args[1:], **kwargs).to(given)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a model, such as ``model.layers.3.mlp``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def modules_named(model: nn.Module, names: Sequence[str], *, optional: Sequence[str] = ()) -> list[str]:
    """Return the paths of the modules whose last name part is in ``names``, without those inside one another.

    Raises:
        ConfigError: If a name that is not optional matches nothing.
    """
    paths = [
        path
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in names and not _is_inside(path, names)
    ]
    found = {path.rpartition(".")[2] for path in paths}
    for name in names:
        if name not in optional and name not in found:
            raise ConfigError(
                f"modules_to_save names {name!r}, but {type(model).__name__} has no such module; "
                "see model.named_modules()"
            )
    return paths


def _is_inside(path: str, names: Sequence[str]) -> bool:
    parts = path.split(".")[:-1]
    return any(part in names or part in ("modules_to_save", "original_module") for part in parts)


def head_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the values of trained modules under PEFT's names, sharing their memory.

    Args:
        modules: The trained modules by their paths in the base.
    """
    return {
        f"{HEAD}{path}.{name}": value.detach()
        for path, module in modules.items()
        for name, value in module.state_dict().items()
    }


@final
class _OwnDtype(nn.Module):
    """Calls a module by ``in_own_dtype``; other attributes are the module's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return in_own_dtype(self.module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _module_at(base: Base, path: str) -> nn.Module:
    try:
        return base.model.get_submodule(path)
    except AttributeError as cause:
        raise ConfigError(
            f"{base.facts.architecture} has no module {path!r}, which the prompt has a trained copy of; "
            "use the base the prompt was made for"
        ) from cause
