"""What a prompt may be called, and finding it under that name."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from softprompt.attach.heads import BASE
from softprompt.errors import AdapterError, nearest

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_new(name: str, taken: Collection[str], owner: nn.Module) -> None:
    """Refuse a name that is taken, that is no plain folder name, or that ``owner`` cannot hold.

    Raises:
        AdapterError: If the name cannot be used.
    """
    if name in taken:
        raise AdapterError(f"Adapter with name '{name}' already exists.")
    if not _NAME.fullmatch(name) or name == BASE:
        raise AdapterError(
            f"adapter name must match {_NAME.pattern} and not be {BASE!r}, got {name!r}"
        )
    if hasattr(owner, name):
        raise AdapterError(
            f"adapter name {name!r} is a word torch keeps for itself; choose another"
        )


def known(name: str, names: Collection[str]) -> str:
    """Return a name that is there.

    Raises:
        AdapterError: If it is not.
    """
    if name not in names:
        raise AdapterError(
            f"Adapter {name} not found.{nearest(name, names)} There are: {', '.join(names)}"
        )
    return name
