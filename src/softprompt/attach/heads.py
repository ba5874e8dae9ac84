"""Modules trained beside the prompt (``modules_to_save``), such as a new classification head."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError

BASE = "__base__"
"""The name that stands for no prompt in ``adapter_names``."""


class SwitchedHead(nn.Module):
    """One module of the base, with a trained copy for each adapter.

    ``active`` names the copy to run, one name for the batch or one per row; None and
    ``__base__`` run the original, whose weights never change.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.active: str | tuple[str, ...] | None = None

    def add(self, adapter: str) -> nn.Module:
        """Copy the original for an adapter, in float32."""
        head = copy.deepcopy(self.original_module).float()
        self.modules_to_save[adapter] = head
        return head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active copy, or each row through its own."""
        if not isinstance(self.active, tuple):
            return self._run(self.active, args, kwargs)
        first: Tensor = args[0]
        result: Tensor | None = None
        for name in dict.fromkeys(self.active):
            index = torch.tensor(
                [i for i, n in enumerate(self.active) if n == name], device=first.device
            )
            part = self._run(name, (first[index], *args[1:]), kwargs)
            if result is None:
                result = part.new_empty((first.shape[0], *part.shape[1:]))
            result = result.index_copy(0, index, part)
        return result

    def _run(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trained = name is not None and name in self.modules_to_save
        head = self.modules_to_save[cast(str, name)] if trained else self.original_module
        wanted = next(head.parameters()).dtype
        came = args[0].dtype
        if torch.is_autocast_enabled(args[0].device.type) or wanted == came:
            return head(*args, **kwargs)
        return head(args[0].to(wanted), *args[1:], **kwargs).to(came)


def find_heads(model: nn.Module, names: Sequence[str], *, required: Sequence[str]) -> list[str]:
    """Return the paths of the modules whose last name part is in ``names``.

    Raises:
        ConfigError: If a required name matches nothing.
    """
    paths = [
        path
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in names and not _inside_head(path, names)
    ]
    for name in required:
        if not any(path.rpartition(".")[2] == name for path in paths):
            raise ConfigError(
                f"modules_to_save names {name!r}, but {type(model).__name__} has no such module; "
                "see model.named_modules()"
            )
    return paths


def switch_heads(model: nn.Module, paths: Sequence[str]) -> dict[str, SwitchedHead]:
    """Put a switch in the place of each module."""
    switches: dict[str, SwitchedHead] = {}
    for path in paths:
        current = model.get_submodule(path)
        if not isinstance(current, SwitchedHead):
            current = SwitchedHead(current)
            _set(model, path, current)
        switches[path] = current
    return switches


def restore_heads(model: nn.Module) -> None:
    """Put every original module back in its place."""
    for path, switch in list(switches_of(model)):
        _set(model, path, switch.original_module)


def switches_of(model: nn.Module) -> Iterator[tuple[str, SwitchedHead]]:
    """Yield the switched modules of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, SwitchedHead):
            yield path, module


def _inside_head(path: str, names: Sequence[str]) -> bool:
    parts = path.split(".")[:-1]
    return any(part in names or part in ("modules_to_save", "original_module") for part in parts)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
