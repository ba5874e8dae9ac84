"""``softprompt`` and ``peft``: the folder of ``save_adapter``, with and without what PEFT lacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.artifacts.files import parse_object, read_bytes
from softprompt.artifacts.formats.format import Export, Format, Source
from softprompt.artifacts.layout import (
    MANIFEST_NAME,
    PICKLED_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from softprompt.artifacts.peft_folder import load_adapter, save_adapter
from softprompt.artifacts.stored_prompt import StoredPrompt
from softprompt.backbone import Base
from softprompt.errors import ArtifactError
from softprompt.prompts import CONFIG_NAME, PeftType


def _lacks_folder(path: Path) -> str | None:
    if not path.is_dir():
        return "not a folder"
    if not (path / CONFIG_NAME).is_file():
        return f"no {CONFIG_NAME}"
    if not any((path / name).is_file() for name in (WEIGHTS_NAME, PICKLED_WEIGHTS_NAME)):
        return f"no {WEIGHTS_NAME} or {PICKLED_WEIGHTS_NAME}"
    return None


def _lacks_ours(path: Path) -> str | None:
    missing = _lacks_folder(path)
    if missing is not None or (path / MANIFEST_NAME).is_file():
        return missing
    text = read_bytes(path / CONFIG_NAME).decode(errors="replace")
    kind = parse_object(text, str(path / CONFIG_NAME)).get("peft_type")
    return None if kind == PeftType.EXTENDED_PROMPT_TUNING else f"no {MANIFEST_NAME}"


def _read(source: Source, base: Base | None) -> StoredPrompt:
    return load_adapter(source)


def _write(export: Export, path: Path) -> Mapping[str, Any]:
    stored = export.stored if export.task is None else export.single()
    save_adapter(path, stored.config, stored.tensors, stored.manifest, overwrite=export.overwrite)
    return {}


def _write_for_peft(export: Export, path: Path) -> Mapping[str, Any]:
    if export.stored.config["peft_type"] == PeftType.EXTENDED_PROMPT_TUNING:
        raise ArtifactError(
            f"{export.stored.location} cannot be written as peft: PEFT would run another model, because "
            "it lacks the options the prompt has (adapter_config.json); use --to softprompt"
        )
    return _write(export, path)


SOFTPROMPT = Format(
    "softprompt",
    f"a folder with {CONFIG_NAME}, {WEIGHTS_NAME} and {MANIFEST_NAME}",
    _lacks_ours,
    _read,
    _write,
)
PEFT = Format(
    "peft",
    f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME} (or {PICKLED_WEIGHTS_NAME})",
    _lacks_folder,
    _read,
    _write_for_peft,
)
