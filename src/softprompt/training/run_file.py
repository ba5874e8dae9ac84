"""``run.toml``: a run's own configuration, kept beside its prompt so that it can be repeated."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.artifacts.files import write_atomically
from softprompt.errors import ConfigError, nearest
from softprompt.training.settings import TuneSettings, TuningConfig

RUN_FILE = "run.toml"
SOURCES = ("base_model", "train_data", "validation_data", "output")
"""Keys besides the settings."""


def read_run(path: str | Path) -> dict[str, Any]:
    """Read a run file into keyword arguments of `tune`, checking that every key exists.

    Raises:
        ConfigError: the file is missing, is not TOML, has an unknown key, or a source that is no text.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the run file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _check_keys(values, [*SOURCES, "lr", *TuneSettings.__dataclass_fields__], str(path))
    for name in SOURCES:
        if not isinstance(values.get(name, ""), str):
            raise ConfigError(f"{path}: {name} takes a text; got {values[name]!r}")
    tuning = values.get("tuning_config", {})
    if not isinstance(tuning, dict):
        raise ConfigError(f"{path}: tuning_config must be a table, [tuning_config]")
    _check_keys(tuning, list(TuningConfig.__dataclass_fields__), f"{path} [tuning_config]")
    return values


def write_run(path: Path, sources: Mapping[str, str | None], settings: TuneSettings) -> None:
    """Write a run file; a source that is None was in memory and is noted as a comment."""
    lines = [
        f"{name} = {_literal(value)}"
        if value is not None
        else f"# {name} was in memory and has to be given again"
        for name, value in sources.items()
    ]
    values = settings.to_dict()
    tuning = values.pop("tuning_config")
    lines += [f"{name} = {_literal(value)}" for name, value in values.items()]
    lines += ["", "[tuning_config]"]
    lines += [f"{name} = {_literal(value)}" for name, value in tuning.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")


def _check_keys(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{where}: unknown key {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )


def _literal(value: Any) -> str:
    """Return a value as TOML: its texts, numbers and booleans are spelt as in JSON."""
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
