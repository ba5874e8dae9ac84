"""What the commands share: options, made from fields of settings and shown in groups, and output.

Results go to stdout, everything else to stderr.

click lists options under one heading; ``Command`` does by their fields' groups, without rich's import time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, final, get_args, get_origin

import click

from softprompt.cli.parameter_types import NumberOr, Place
from softprompt.errors import UsageError, in_options, line, visible
from softprompt.fields import choices_of, default_of, say_renamed, type_of
from softprompt.progress import silence
from softprompt.untrusted import MOST_TEXT_BYTES
from softprompt.world import world

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

WORDED = "softprompt.worded"
"""Where a context of click keeps what puts messages into the words of its command."""
ALIASES = {"learning_rate": ("--lr",), "prompt_tuning_init_method": ("--init",)}
BASE = ("base_model", "torch_dtype", "device", "ignore_fingerprint")


@final
class Option(click.Option):
    """An option with a heading; None is the last one, "Options"; ``formerly`` is as in ``setting``."""

    def __init__(self, *names: Any, group: str | None = None, formerly: Any = None, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group, self.formerly = group, formerly


_FOLDERS = ("prompt_dir", "prompt_dirs", "first", "second", "folder", "directory", "prompts", "source_prompt_base")
_FILES = ("base_model", "source", "destination", "train_data", "validation_data", "data", "api_key_file")
"""Parameters that a shell completes with folders, and with files or folders."""


@final
class Command(click.Command):
    """A command whose help lists its options in groups, in the order of their first options, output at the end.

    What it says names options where the library names arguments.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of the command line; which command they are for is noted for errors."""
        ctx.meta[WORDED] = self.worded
        return super().parse_args(ctx, self._present(args))

    def _present(self, words: list[str]) -> list[str]:
        """Return the words of the command line, options' earlier names as the present ones; no value is one.

        Raises:
            UsageError: An option is given under both names.
        """
        known, earlier = dict[str, click.Option](), dict[str, tuple[str, str]]()
        for each in [each for each in self.params if isinstance(each, click.Option)]:
            known |= dict.fromkeys((*each.opts, *each.secondary_opts), each)
            was, end = getattr(each, "formerly", None) or ("", "")
            olds = (f"--{was}", f"--no-{was}") if was else ()
            for old, new in zip(olds, (*each.opts[:1], *each.secondary_opts), strict=False):
                earlier[old.replace("_", "-")] = new, end
        found, given, free = list(words), dict[str | None, bool](), 0
        for place, word in enumerate(words):
            name, equals, value = word.partition("=")
            new, end = earlier.get(name, (name, ""))
            if word == "--" and place >= free:
                break
            if place < free or new not in known:
                continue
            each = known[new]
            if given.setdefault(each.name, name in earlier) != (name in earlier):
                raise UsageError(f"{each.opts[0]} is given under its earlier name too; leave that out")
            if name in earlier:
                say_renamed(name, new, end)
                found[place] = f"{new}{equals}{value}"
            alone = equals or each.is_flag or each.count or getattr(each, "_flag_needs_value", False)
            free = place + 1 + (0 if alone else each.nargs)
        return found

    def worded(self, message: str) -> str:
        """Return a message of the library in the words of this command."""
        options = [each for each in self.params if isinstance(each, click.Option)]
        return in_options(message, {str(each.name): each.opts[0] for each in options})

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        for each in self.params:
            if each.name in (*_FOLDERS, *_FILES) and each.type is click.STRING:
                each.type = Place("dir" if each.name in _FOLDERS else "file")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        groups: dict[str | None, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", None), []).append(record)
        others = groups.pop(None, [])
        written = groups.pop("Output", [])
        for title, records in [*groups.items(), ("Output", written), ("Options", others)]:
            if records:
                with formatter.section(title or ""):
                    formatter.write_dl(records)


def option(*names: str, group: str | None = None, **attributes: Any) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds an option under a heading."""
    return click.option(*names, cls=Option, group=group, **attributes)


def together(*options: Callable[[Any], Any]) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds options, in this order."""

    def decorate(command: Decorated) -> Decorated:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


def options_of(owner: type, *, leave_out: Collection[str] = ()) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds one option per field of a settings dataclass.

    Every option defaults to None, "not given", so that a run file or the dataclass itself supplies
    the value; the help shows the dataclass's default.
    """
    return together(*(_option(owner, each) for each in fields(owner) if each.name not in leave_out))


def generation_options(*leave_out: str) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds the options of ``GenerationOptions``; a JSON schema is in a file."""
    from softprompt.generation import GenerationOptions

    schema = option(
        "--json-schema",
        type=click.File(encoding="utf-8"),
        callback=lambda context, parameter, file: file and file.read(MOST_TEXT_BYTES),
        group="Form of the answer",
        help="File with a JSON schema of the answer, which is JSON then.",
    )
    return together(options_of(GenerationOptions, leave_out=("json_schema", *leave_out)), schema)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def parts_of(values: dict[str, Any], owner: type) -> dict[str, Any]:
    """Pop the options that are fields of ``owner`` from ``values``, and return them."""
    names = [item.name for item in fields(owner) if item.name in values]
    return {name: values.pop(name) for name in names}


output_options = together(
    option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."),
    option("--quiet", is_flag=True, help="Show warnings and errors only, and no progress bar."),
)
overwrite_option = option(
    "--overwrite", is_flag=True, group="Output", help="Write into an output directory that is not empty."
)
write_options = together(
    option("--output", required=True, type=click.Path(), group="Output", help="Directory to write the prompt to."),
    overwrite_option,
)
_base = partial(option, group="Base model")
data_option = option(
    "--data", type=click.Path(), group="Input", help="Data file; each record is an input, targets are not read."
)
fingerprint_option = _base(
    "--ignore-fingerprint", is_flag=True, help="Use a base model that the prompt was not trained for."
)
trust_option = _base(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=lambda context, parameter, value: value and import_module("softprompt.backbone").trust_code(),
    help="Run the Python code in the base model's files (auto_map) with your rights; read it first.",
)
base_options = together(
    fingerprint_option,
    _base("--base-model", help="Base model instead of the recorded one; its fingerprint is checked."),
    _base("--torch-dtype", help="Data type of the base model; by default the recorded one."),
    _base("--device", help="Device, such as cpu or cuda:0."),
    trust_option,
)
"""Options of loading the base model of a saved prompt; see ``load_prompts``."""
input_options = together(
    option(
        "--field",
        "pairs",
        multiple=True,
        metavar="NAME=TEXT",
        group="Input",
        help="Field of a template that has several.  [repeatable]",
    ),
    option("--task-name", group="Input", help="Task of a multitask prompt, by name or number."),
)


def label_names_option(group: str) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds ``--label-names``, whose value is a mapping or None."""
    return option(
        "--label-names",
        metavar="TARGET=NAME,...",
        callback=_label_names,
        group=group,
        help="Names of targets that are numbers, such as 0=negative,1=positive.",
    )


def _label_names(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, str] | None:
    # A comma ends a name only where another target follows, since names may have commas.
    words = [] if value is None else re.split(r",(?=[^,=]+=)", value)
    return named(words, "--label-names", "TARGET=NAME,TARGET=NAME") or None


def load_prompts(prompt_dirs: Sequence[str], options: dict[str, Any]) -> list[TunedPrompt]:
    """Load prompts of one base model with the options of ``base_options``, popped from ``options``."""
    from softprompt.inference import load_many

    return load_many(prompt_dirs, **{name: options.pop(name) for name in (*BASE, "shard") if name in options})


def named(words: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """Return the values of ``NAME=VALUE`` words by their names.

    Args:
        words: The words.
        flag: The option, for errors.
        form: What it takes, such as ``NAME=PROMPT``.

    Raises:
        UsageError: A word has no name or no value, or a name is repeated.
    """
    found: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not (separator and name and value):
            raise UsageError(f"{flag} takes {form}; got {word!r}")
        if name in found:
            raise UsageError(f"{flag} names {name!r} twice; give each name once")
        found[name] = value
    return found


def request_of(text: str | None, pairs: Sequence[str]) -> str | dict[str, str]:
    """Return the input of ``--text`` and ``--field``: a text, or fields by name.

    Raises:
        UsageError: A field has no name, or is given twice.
    """
    if not pairs:
        return text or ""
    fields = {} if text is None else {"input": text}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UsageError(f"--field takes NAME=TEXT; got {pair!r}")
        if name in fields:
            raise UsageError(f"{name!r} is given twice by --field, or by --text and --field; leave one out")
        fields[name] = value
    return fields


def _option(owner: type, item: Field[Any]) -> Callable[[Decorated], Decorated]:
    flag = "--" + item.name.replace("_", "-")
    kind = type_of(owner, item.name)
    default = default_of(item)
    no_default = default in (None, (), MISSING)
    text = item.metadata["help"] + ("" if no_default else f"  [default: {_shown(default)}]")
    shared: dict[str, Any] = {name: item.metadata.get(name) for name in ("group", "formerly")} | {"help": text}
    if default is MISSING:
        shared["required"] = True
    if kind is bool:
        return option(f"{flag}/--no-{flag[2:]}", item.name, default=None, **shared)
    choices = choices_of(owner, item.name)
    if choices is not None:
        kind = click.Choice(choices, case_sensitive=False)
    if word := item.metadata.get("word"):
        kind = NumberOr(word)
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        return option(flag, item.name, type=get_args(kind), **shared)
    if get_origin(kind) is tuple:
        shared["help"] = text + "  [repeatable]"
        return option(flag, item.name, multiple=True, **shared)
    if item.name in ALIASES:
        shared |= {"multiple": True, "callback": _once}
    return option(flag, *ALIASES.get(item.name, ()), item.name, type=kind, **shared)


def _once(context: click.Context, parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Return the one value of an option with two names; click would use the last of several."""
    if len(values) > 1:
        raise UsageError(f"{' and '.join(parameter.opts)} are the same setting; give it once")
    return values[0] if values else None


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def start_logging(*, quiet: bool) -> None:
    """Send softprompt's log lines to stderr, without the loading bars of transformers; quiet ones warn alone."""
    main = world().is_main
    silence(silent=quiet or not main)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # errors are one line, also after six attempts to connect
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    logger = logging.getLogger("softprompt")
    for old in [each for each in logger.handlers if isinstance(each, _ToStandardError)]:
        logger.removeHandler(old)
    logger.addHandler(_ToStandardError())
    logger.setLevel(logging.CRITICAL + 1 if not main else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def show(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result: as one JSON object, or as text for people."""
    write((json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else text) + "\n")


def write(text: str) -> None:
    """Write to stdout; on a terminal control characters, as a model may write them, are spelt out."""
    click.echo(visible(text) if sys.stdout.isatty() else text, nl=False)


def say(text: str) -> None:
    """Write lines to stderr, visible whatever they hold; of several processes the first one does."""
    if world().is_main:
        click.echo("\n".join(map(visible, text.split("\n"))), err=True)


def table(rows: Mapping[str, Any]) -> str:
    """Return names and values in two columns, leaving out what is None."""
    width = max(map(len, rows), default=0)
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {_number(value)}" for name, value in rows.items() if value is not None
    )


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


class _ToStandardError(logging.Handler):
    """Writes to the stderr of the moment, so that a replaced one is honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; warnings say that they are."""
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        context, message = click.get_current_context(silent=True), record.getMessage()
        message = message if context is None else context.meta.get(WORDED, str)(message)
        sys.stderr.write(f"{prefix}{line(message)}\n")
