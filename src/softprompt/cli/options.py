"""Command-line options made from the fields of settings dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar, get_args, get_origin

import click

from softprompt.errors import UsageError
from softprompt.fields import choices_of, default_of, type_of

Command = TypeVar("Command", bound=Callable[..., Any])

ALIASES = {"learning_rate": ("--lr",)}


def options_of(owner: type, *, leave_out: Collection[str] = ()) -> Callable[[Command], Command]:
    """Return a decorator that adds one option per field of ``owner``.

    Every option defaults to None, "not given", so that a file or the dataclass itself can
    supply the value; the help shows the dataclass's default.
    """
    chosen = [item for item in fields(owner) if item.name not in leave_out]

    def decorate(command: Command) -> Command:
        for item in reversed(chosen):
            command = _option(owner, item)(command)
        return command

    return decorate


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def parts_of(values: dict[str, Any], owner: type) -> dict[str, Any]:
    """Take the given options that belong to ``owner`` out of ``values``."""
    names = [item.name for item in fields(owner) if item.name in values]
    return {name: values.pop(name) for name in names}


def output_options(command: Command) -> Command:
    """Add ``--json`` and ``--quiet``, which every command has."""
    command = click.option(
        "--quiet", is_flag=True, help="Show warnings and errors only, and no progress bar."
    )(command)
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
    )(command)


def fingerprint_option(command: Command) -> Command:
    """Add the way around the check of the base."""
    return click.option(
        "--ignore-fingerprint", is_flag=True, help="Use a base that the prompt was not made for."
    )(command)


def base_options(command: Command) -> Command:
    """Add what decides how the base of a saved prompt is loaded."""
    for name, text in (
        ("--device", "Device to run on, such as cpu or cuda:0."),
        ("--torch-dtype", "Data type of the base; by default the recorded one."),
        ("--base-model", "Base model to use instead of the recorded one; it is checked."),
    ):
        command = click.option(name, help=text)(command)
    return fingerprint_option(command)


def _option(owner: type, item: Field[Any]) -> Callable[[Command], Command]:
    flag = "--" + item.name.replace("_", "-")
    kind = type_of(owner, item.name)
    default = default_of(item)
    text = item.metadata["help"] + (
        "" if default in (None, ()) else f"  [default: {_shown(default)}]"
    )
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, help=text)
    choices = choices_of(owner, item.name)
    if choices is not None:
        return click.option(flag, item.name, type=click.Choice(choices), help=text)
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        return click.option(flag, item.name, type=get_args(kind), help=text)
    if get_origin(kind) is tuple:
        return click.option(flag, item.name, multiple=True, help=text + "  [repeatable]")
    if item.name in ALIASES:
        names = (flag, *ALIASES[item.name], item.name)
        return click.option(*names, type=kind, help=text, multiple=True, callback=_once)
    return click.option(flag, item.name, type=kind, help=text)


def _once(context: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Return the one value of an option with two names; click would take the last of several."""
    if len(values) > 1:
        raise UsageError(f"{' and '.join(parameter.opts)} are the same setting; give it once")
    return values[0] if values else None


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)
