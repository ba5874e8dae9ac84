"""Modules trained with the prompt (``modules_to_save``), such as a new classification head."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from softprompt.backbone import in_own_dtype, set_module
from softprompt.errors import AdapterError

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

    def add(self, adapter: str, trained: nn.Module | None = None) -> None:
        """Give an adapter its module: a trained one, or a copy of the original in float32."""
        if trained is None:
            trained = copy.deepcopy(self.original_module).float()
        self.modules_to_save[adapter] = trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active copy, or each row through its own."""
        if not isinstance(self.active, tuple):
            return self._run(self.active, args, kwargs)
        first: Tensor = args[0]
        # Beams and returned sequences repeat each row.
        times = first.shape[0] // len(self.active)
        names = [name for name in self.active for _ in range(times)]
        result: Tensor | None = None
        for name in dict.fromkeys(self.active):
            index = torch.tensor([i for i, n in enumerate(names) if n == name], device=first.device)
            part = self._run(name, (first[index], *args[1:]), kwargs)
            if result is None:
                result = part.new_empty((first.shape[0], *part.shape[1:]))
            result = result.index_copy(0, index, part)
        return result

    def _run(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trained = name is not None and name in self.modules_to_save
        head = self.modules_to_save[cast(str, name)] if trained else self.original_module
        return in_own_dtype(head, *args, **kwargs)


def require_free(model: nn.Module, paths: Sequence[str], adapter: str) -> None:
    """Refuse a second trained copy under one name, which would replace the first.

    Raises:
        AdapterError: If another prompted model on the same base has such a copy.
    """
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, SwitchedHead) and adapter in module.modules_to_save:
            raise AdapterError(
                f"the base already carries a {path} for an adapter named {adapter!r}, of another prompted "
                "model; unload that one first, or give this adapter another name"
            )


def add_heads(
    model: nn.Module,
    paths: Sequence[str],
    adapter: str,
    trained: Mapping[str, nn.Module] | None = None,
) -> None:
    """Replace each module by a switch that has a copy for an adapter, or its module among ``trained``."""
    for path in paths:
        current = model.get_submodule(path)
        if not isinstance(current, SwitchedHead):
            current = SwitchedHead(current)
            set_module(model, path, current)
        current.add(adapter, (trained or {}).get(path))


def drop_heads(model: nn.Module, adapter: str) -> None:
    """Delete an adapter's copies."""
    for _, switch in switches_of(model):
        if adapter in switch.modules_to_save:
            del switch.modules_to_save[adapter]


def restore_heads(model: nn.Module) -> None:
    """Put every original module back."""
    for path, switch in list(switches_of(model)):
        set_module(model, path, switch.original_module)


@contextmanager
def active_heads(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Run each row's own heads inside the context; hold the model's lock around it.

    Args:
        model: The base.
        adapters: The adapter of each row, ``__base__`` for the base's own heads, ``[B]``.
    """
    switches = [switch for _, switch in switches_of(model)]
    for switch in switches:
        switch.active = adapters[0] if len(set(adapters)) == 1 else tuple(adapters)
    try:
        yield
    finally:
        for switch in switches:
            switch.active = None


def switches_of(model: nn.Module) -> Iterator[tuple[str, SwitchedHead]]:
    """Yield the switched modules of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, SwitchedHead):
            yield path, module


def heads_of(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield an adapter's copies with the paths of the modules they stand for."""
    for path, switch in switches_of(model):
        if adapter in switch.modules_to_save:
            yield path, switch.modules_to_save[adapter]
