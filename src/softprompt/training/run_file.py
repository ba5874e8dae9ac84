"""``run.toml``, which repeats or resumes a run: reading and writing it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.artifacts import anchored, check_plain, portable, read_bytes, write_atomically
from softprompt.errors import ConfigError, broken, nearest
from softprompt.fields import renamed
from softprompt.training.keywords import ALIASES
from softprompt.training.settings import TuneSettings
from softprompt.training.tuning_config import TuningConfig
from softprompt.untrusted import MOST_DEPTH, check_base_name

RUN_FILE = "run.toml"
DATA = ("train_data", "validation_data")
SOURCES = ("base_model", *DATA, "output")
"""Keys besides the settings."""
_MOST_BYTES = 1 << 18
_TEXT = re.compile(
    r"\"{3}(?:[^\"\\]|\\.|\"(?!\"\"))*+(?:\"{3,5}|\Z)|'{3}(?:[^']|'(?!''))*+(?:'{3,5}|\Z)"
    r"|\"(?:\\.|[^\"\\\n])*+\"?|'[^'\n]*+'?|#[^\n]*+",
    re.DOTALL,
)
"""Texts and comments of TOML, the unfinished ones to their ends."""
_DEEP = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MOST_DEPTH}}}")
SWEEP = "sweep"
"""Table of what a sweep tries; a run passes over it."""


def read_run(path: str | Path) -> dict[str, Any]:
    """Read a run file into keyword arguments of `tune`, checking that every key exists.

    A path that starts with ``./`` is found from the working directory, or else from a folder above the file.

    Raises:
        ConfigError: the file is missing, is not TOML, has an unknown key, or a source that is no text.
    """
    data = read_bytes(Path(path), _MOST_BYTES, ConfigError)
    try:
        text = data.decode()
        if _DEEP.search(_TEXT.sub("text", text)):  # of which tomllib keeps every beginning
            raise ValueError(f"a key has more than {MOST_DEPTH} parts")
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # which TOMLDecodeError is
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    check_plain(values, str(path), ConfigError)
    values = renamed(TuneSettings, values)
    _check_keys(values, [*SOURCES, SWEEP, *ALIASES, *TuneSettings.__dataclass_fields__], str(path))
    for name in SOURCES:
        _check_source(values.get(name, ""), name, str(path))
    for name in ("tuning_config", "config", SWEEP):
        if not isinstance(values.get(name, {}), dict):
            raise ConfigError(f"{path}: {name} must be a table, [{name}]")
    tuning = renamed(TuningConfig, values.get("tuning_config", {}))
    _check_keys(tuning, list(TuningConfig.__dataclass_fields__), f"{path} [tuning_config]")
    return dict(anchored(values, Path(path).parent))


def write_run(
    path: Path, sources: Mapping[str, Any], settings: TuneSettings, sweep: Mapping[str, Any] | None = None
) -> None:
    """Write a run file, also of a ``sweep``; a source that is None was in memory and is noted as a comment.

    Data sets by task and other mappings are tables.
    """
    given = {name: value for name, value in sources.items() if not _in_memory(value)}
    lines = [f"# {name} was in memory and has to be given again" for name in sources if name not in given]
    values = portable(given | settings.to_dict(), path.parent) | ({SWEEP: sweep} if sweep else {})
    tables = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    lines += [f"{name} = {_literal(value)}" for name, value in values.items() if name not in tables]
    for table, entries in tables.items():
        lines += ["", f"[{table}]"]
        lines += [f"{_key(name)} = {_literal(value)}" for name, value in entries.items()]
    text = "\n".join(lines) + "\n"
    if problem := broken(text):
        line = next(line for line in lines if broken(line))
        raise ConfigError(f"the run file cannot keep {line!r}, it has {problem}; give it another name in UTF-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _check_keys(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in values:
        if name not in known:
            listed = ", ".join(map(repr, known))  # quoted, since the command line has other names for them
            raise ConfigError(f"{where}: unknown key {name!r}{nearest(name, known)}; known: {listed}")


def _check_source(value: Any, name: str, path: str) -> None:
    if isinstance(value, str):
        if name == "base_model":
            check_base_name(value, path, ConfigError)
        return
    by_task = name in DATA and isinstance(value, dict)
    if not by_task or not all(isinstance(each, str) for each in value.values()):
        takes = "a text, or a table of task = text" if name in DATA else "a text"
        raise ConfigError(f"{path}: {name!r} takes {takes}; got {value!r}")


def _in_memory(source: Any) -> bool:
    return source is None or (isinstance(source, Mapping) and None in source.values())


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _literal(name)


def _literal(value: Any) -> str:
    """Return a value as TOML: its texts, numbers and booleans are spelt as in JSON."""
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(name)} = {_literal(each)}" for name, each in value.items())
        return "{ " + inside + " }"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
