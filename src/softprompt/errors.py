"""Every error softprompt raises on purpose, one tree under one root.

Every message says what was expected, what was given, and what to do next, in one line.
The classes also derive from the builtin that a PEFT or transformers user would
catch (``ValueError``, ``KeyError``), so swapping libraries keeps handlers working.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


class SoftPromptError(Exception):
    """Root of all deliberate errors; the command line turns each into one line and exit code 2."""

    def __str__(self) -> str:
        """Return the message as written, also where the builtin parent would quote it."""
        return " ".join(str(part) for part in self.args)


class ConfigError(SoftPromptError, ValueError):
    """A setting is wrong, unknown, or contradicts another."""


class UsageError(ConfigError):
    """An argument of a command or of ``tune`` is wrong."""


class InterfaceError(ConfigError, TypeError, AttributeError):
    """A call of PEFT's interface that a prompt does not support; caught as what PEFT raises there."""


class DataError(SoftPromptError, ValueError):
    """A data file, or a record in it, cannot be used."""


class TemplateError(DataError):
    """The verbalizer and the records do not fit together."""


class BackboneError(SoftPromptError, ValueError):
    """The base model cannot be loaded, or lacks a fact that is needed."""


class ContextOverflowError(BackboneError):
    """Prompt and input together exceed the model's context."""


class FingerprintError(BackboneError):
    """The prompt was made for another base model."""


class ArtifactError(SoftPromptError, ValueError):
    """A saved prompt is missing, damaged or in a form that cannot be read."""


class OutputExistsError(ArtifactError):
    """Writing would overwrite something that is already there."""


class AdapterError(SoftPromptError, ValueError):
    """A named prompt does not exist, or already does."""


class ServingError(SoftPromptError, RuntimeError):
    """A request cannot be answered."""


class QueueFullError(ServingError):
    """Too many requests wait already.

    Attributes:
        retry_after: Seconds after which there is likely to be room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotServingError(ServingError):
    """Serving has stopped, is stopping, or has failed."""


class TrainingError(SoftPromptError, RuntimeError):
    """The optimisation cannot go on."""


class TrainingInterrupted(TrainingError):
    """Training was stopped by the user; its state is saved and can be resumed."""


IGNORING = "ignore_fingerprint=True"


_AS_A_NAME = r"(?==| (?:takes|must|expects|is one of|would|has no|to \'|[0-9]))"


def in_options(message: str, options: Mapping[str, str] | None = None) -> str:
    """Return a message of the library in the words of the command line.

    An argument without an underscore is an ordinary word too, so it is taken for a name only before a value and
    before the words that errors of settings use. What stands in quotes is not the library's.

    Args:
        message: A message that names arguments of Python.
        options: The option that stands for each argument; None are those of every command.
    """
    for name, option in (options or {"ignore_fingerprint": "--ignore-fingerprint"}).items():
        word = rf"(?<![\w./\'\"-])(?:tuning_config\.)?{name}(?![\w/\'\"-]|\.\w)"
        if "_" not in name:
            word += _AS_A_NAME
        message = re.sub(word + "(=True)?", option, message)
    # Where a message names the argument and the option, one of them is left.
    return re.sub(r"(--[\w-]+) \(\1(?: in Python)?\)", r"\1", message)


def excerpt(text: str, most: int = 64) -> str:
    """Return the beginning of a text that is too long to be said back."""
    return text if len(text) <= most else f"{text[:most]}..."


def broken(text: str) -> str:
    """Return what no tokenizer and no file can take of a text, half a surrogate pair; of a whole text nothing.

    Such halves come from JSON escapes, and from bytes that are not UTF-8 on the command line.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        return f"half of a character (a lone surrogate, {half}) at {error.start} of a text"
    return ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `` (did you mean 'lr'?)`` for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
