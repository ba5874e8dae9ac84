"""Every error softprompt raises on purpose, one tree under one root.

Every message says what was expected, what was given, and what to do next, in one line.
The classes also derive from the builtin that a PEFT or transformers user would
catch (``ValueError``, ``KeyError``), so swapping libraries keeps handlers working.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MOST_OF_A_LINE = 1000
"""Characters of an error or a log line."""


def visible(text: str) -> str:
    """Return a text with what a terminal would obey spelt as in JSON: escape sequences, changes of direction."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def line(text: str, most: int = MOST_OF_A_LINE) -> str:
    """Return a text as one visible line; of a longer one its beginning and its end, which says what to do."""
    if len(text) > 2 * most:  # what follows takes as long as the text
        text = f"{text[:most]} {text[-most:]}"
    shown = visible(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))
    return shown if len(shown) <= most else f"{shown[: most * 2 // 3]} ... {shown[-most // 4 :]}"


def first_line(error: BaseException, most: int = 120) -> str:
    """Return the first line of another library's error without its full stop; its type where it says nothing."""
    said = str(error).strip() or type(error).__name__
    return line(said.splitlines()[0].rstrip("."), most)


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class SoftPromptError(Exception):
    """Root of all deliberate errors; the command line turns each into one line and exit code 2."""

    def __str__(self) -> str:
        """Return the message as one short line, whatever the strings in it are that are not ours."""
        return line(" ".join(str(part) for part in self.args))


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


class UpstreamError(NotServingError):
    """A server that computes for this one cannot be reached, or failed.

    Attributes:
        status: What a gateway answers then: 502, or 503 where it may soon be otherwise.
    """

    def __init__(self, message: str, *, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


class TrainingError(SoftPromptError, RuntimeError):
    """The optimisation cannot go on."""


class TrainingInterrupted(TrainingError):
    """Training was stopped by the user; its state is saved and can be resumed."""


class DistributedError(SoftPromptError, RuntimeError):
    """The processes of a run do not go the same way any more; its last saved state can be resumed."""


class ProcessLostError(DistributedError):
    """Another process of the run has ended."""


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
        word = rf"(?<![\w./\'\"-])(?:tuning_config\.)?{name}(?![\w/\'\"-]|\.\w| in \S+\.json)"
        if "_" not in name:
            word = rf"(?<!of )(?<!kept ){word}{_AS_A_NAME}"
        message = re.sub(word + "(=True)?", option, message)
    # Where a message names the argument and the option, one of them is left.
    return re.sub(r"(--[\w-]+) \(\1(?: in Python)?\)", r"\1", message)


def excerpt(text: str, most: int = 64) -> str:
    """Return the beginning of a text that is too long to be said back."""
    return text if len(text) <= most else f"{text[:most]}..."


_PATH = re.compile(r"(?<![\w.:/])/(?!v1/)(?:[^\s/'\",:;()]+/)+([^\s/'\",:;()]*)")


def without_folders(text: str) -> str:
    """Return a text whose absolute paths are their last parts alone, for readers of another machine."""
    return _PATH.sub(r"\1", text)


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


def no_folder(name: str | Path, *, before_hub: bool = False) -> str:
    """Return what to say of a path that is not there, such as "no folder runs/tw; did you mean runs/tw0?".

    Empty where it is there, or may as well be a Hub id: it has the form of one, and nothing here is called like it.
    With ``before_hub``, when the Hub was not asked yet, it is also empty for an id whose own parent folder holds
    nothing like it, and for one in the local Hub cache.
    """
    path = Path(name)
    if path.exists():
        return ""
    is_id = HUB_NAME.fullmatch(str(name)) is not None
    near, said = _nearest_path(path), f"no {'file' if path.suffix == '.gguf' else 'folder'} {name}"
    if before_hub and is_id:
        if near is None or near.parent != path.parent or path.parent == Path() or _is_cached(path):
            return ""
        return f"{said}; did you mean {near}? For one on the Hub, download it first: hf download {name}"
    if near is not None:
        return f"{said}; did you mean {near}?"
    held = _folders(path.parent) if path.parent != Path() else []
    if held:
        return f"{said}; {path.parent} holds {', '.join(held[:5])}{' ...' if len(held) > 5 else ''}"
    return "" if is_id else f"{said}; check the path"


def _is_cached(path: Path) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE  # `softprompt --help` does not wait for it

    return Path(HF_HUB_CACHE, "models--" + "--".join(path.parts)).exists()


def _nearest_path(path: Path) -> Path | None:
    """Return the folder or GGUF file that a misspelt path is likely to mean, its parents misspelt or not."""
    folder: Path | None = path.parent
    if not path.parent.is_dir():
        folder = None if path.parent == path else _nearest_path(path.parent)
        if folder is not None and (folder / path.name).exists():
            return folder / path.name
    close = difflib.get_close_matches(path.name, _folders(folder) if folder else [], n=1)
    return folder / close[0] if folder and close else None


def _folders(folder: Path) -> list[str]:
    try:
        found = [each for each in folder.iterdir() if each.is_dir() or each.suffix == ".gguf"]
    except OSError:  # it may be no folder, or not ours to read
        return []
    return sorted(each.name for each in found if not each.name.startswith("."))
