"""What the value of an option may be, beyond click's own types."""

from __future__ import annotations

from typing import Any, final

import click
from click.shell_completion import CompletionItem


@final
class Place(click.types.StringParamType):
    """A text that a shell completes as a path; it may as well be a name, as on the Hub."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete a ``dir`` or a ``file``."""
        return [CompletionItem(incomplete, type=self._kind)]


@final
class NumberOr(click.ParamType):  # type: ignore[type-arg] # generic from click 8.4 on
    """A number, or the word that stands for one."""

    name = "float"

    def __init__(self, word: str) -> None:
        self._word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word as it is, and anything else as a number."""
        return value if value == self._word else click.FLOAT.convert(value, param, ctx)
