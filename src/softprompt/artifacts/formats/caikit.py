"""``caikit``: the folder that caikit-nlp's ``PeftPromptTuning.save`` writes.

``config.yml`` beside ``encoder.pt`` and ``decoder.pt``; caikit itself refuses to run one without
the base's weights inside (``has_base_model``), its TGIS module runs them as they are.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from softprompt.artifacts import MOST_DEPTH, Origin, StoredPrompt, check_plain, installed_versions, read_bytes
from softprompt.artifacts.formats.format import MEASURED, USED, Export, Format, Source, stored_of_parts
from softprompt.artifacts.formats.tensor_files import PART_NAMES, part_files, parts_of, read_part, write_parts
from softprompt.backbone import Base
from softprompt.errors import ArtifactError, FingerprintError, excerpt
from softprompt.prompts import TaskType
from softprompt.untrusted import MOST_LABEL, MOST_TEMPLATE, check_base_name

CONFIG_FILE = "config.yml"
MODULE_ID = "6655831b-960a-4dc5-8df4-867026e2cd41"
_MODULE = {
    "module_id": MODULE_ID,
    "module_class": "caikit_nlp.modules.text_generation.peft_prompt_tuning.PeftPromptTuning",
    "name": "Peft generation",
    "version": "0.1.0",
}
_LOADER: Any = type("_Loader", (getattr(yaml, "CBaseLoader", yaml.BaseLoader),), {})
"""Reads whole numbers and nulls, all else as texts: YAML's own numbers may be to the base 60, and take minutes."""
_LOADER.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"-?(?:0|[1-9][0-9]{0,17})$"), list("-0123456789")
)
_LOADER.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_LOADER.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|)$"), ["~", "n", ""])
_LOADER.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)
_MOST_BYTES = 1 << 18
_NAME = re.compile("[_a-zA-Z0-9]+")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SIZES = ("model_type", "vocab_size", "hidden_size", "d_model", "n_embd", "num_hidden_layers")


def _lacks(path: Path) -> str | None:
    missing = None if (path / CONFIG_FILE).is_file() else f"no {CONFIG_FILE}"
    return missing if path.is_dir() else "not a folder"


def _read(source: Source, base: Base | None) -> StoredPrompt:
    path = Path(source)
    config = _config(path / CONFIG_FILE)
    files = {part: config[part] for part in PART_NAMES if config.get(part)}
    parts = {part: read_part(_inside(path, part, name)) for part, name in files.items()}
    kinds = {str(TaskType.CAUSAL_LM): False, str(TaskType.SEQ_2_SEQ_LM): True}
    kind = _one_of(kinds, _text(config, "task_type", path), "task_type", path)
    dtype = str(config.get("trained_torch_dtype") or "float32")
    recorded = config.get("base_model_config")
    if base is not None and isinstance(recorded, dict):
        _check_sizes(recorded, base, path)
    given = {key: value for key, value in config.items() if value}
    name = base.name if base else _text(config, "base_model_name", path)
    origin = Origin(
        base_model=check_base_name(name, str(path / CONFIG_FILE)),
        seq2seq=kinds[kind],
        template=_text(config, "verbalizer", path),
        dtype=_one_of(_DTYPES, dtype, "trained_torch_dtype", path),
        settings={"tuning_type": _text({"tuning_type": "PROMPT_TUNING"} | given, "tuning_type", path, MOST_LABEL)},
    )
    return stored_of_parts(parts, origin, base, str(path))


def _write(export: Export, path: Path) -> Mapping[str, Any]:
    stored, base = export.single(), export.loaded()
    manifest = stored.manifest
    names = manifest.fields if manifest else ()
    if foreign := [name for name in names if not _NAME.fullmatch(name)]:
        raise ArtifactError(
            f"{stored.location} cannot be written as caikit: its template has the field {foreign[0]!r}, and names "
            "of caikit have letters, digits and underscores alone; tune it with input_field and {{input}}"
        )
    if manifest and (section := re.search(r"\{\{[#^][^{}]+\}\}", manifest.template)):
        raise ArtifactError(
            f"{stored.location} cannot be written as caikit: its template has the section {section[0]}, and caikit "
            "would print its marks as text; tune it with a template of fields alone"
        )
    if manifest and manifest.chat:
        raise ArtifactError(
            f"{stored.location} cannot be written as caikit: it was trained on chats, and caikit has templates of "
            "fields alone; tune it with --verbalizer"
        )
    parts = parts_of(export.prompt(), seq2seq=stored.seq2seq)
    config = base.model.config.to_dict()
    config.pop("_name_or_path", None)
    now = str(datetime.now())
    values = {
        **_MODULE,
        "softprompt_version": installed_versions()["softprompt"],
        "created": now,
        "saved": now,
        "tracking_id": str(uuid.uuid4()),
        "base_model_config": json.loads(json.dumps(config, default=str)),
        "base_model_name": base.name,
        "eos_token": base.tokenizer.eos_token,
        "has_base_model": False,
        "verbalizer": manifest.template if manifest else "{{input}}",
        "tuning_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM" if stored.seq2seq else "CAUSAL_LM",
        "trained_torch_dtype": manifest.dtype if manifest else "float32",
        "output_model_types": json.dumps(list(parts)),
        **{part: name if part in parts else "" for part, name in PART_NAMES.items()},
        "training_logs": "training_logs.jsonl",
    }
    files = {**part_files(parts), CONFIG_FILE: yaml.safe_dump(values).encode()}
    write_parts(path, files, overwrite=export.overwrite)
    return {}


def _config(path: Path) -> dict[str, Any]:
    try:
        text = read_bytes(path, _MOST_BYTES).decode(errors="replace")
        depth = 0
        # What an alias stands for may hold aliases, and so grow without end; caikit writes none.
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MOST_DEPTH:
                raise ValueError(f"it has an alias, or is nested more than {MOST_DEPTH} deep")
        values = yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"expected plain YAML in {path}, it cannot be read ({reason}): restore it from the original"
        ) from error
    if not isinstance(values, dict):
        raise ArtifactError(
            f"expected a mapping in {path}, got a {type(values).__name__}: restore it from the original"
        )
    check_plain(values, str(path))
    return values


def _text(config: Mapping[str, Any], key: str, path: Path, most: int = MOST_TEMPLATE) -> str:
    value = config.get(key)
    if not isinstance(value, str) or not value:
        raise ArtifactError(
            f"expected a text for {key} in {path / CONFIG_FILE}, got {excerpt(repr(value))}: check that it is a "
            "prompt of caikit-nlp's PeftPromptTuning"
        )
    if len(value) > most:
        raise ArtifactError(
            f"expected at most {most:,} characters for {key} in {path / CONFIG_FILE}, got {len(value):,}: "
            "check that it is what it should be"
        )
    return value


def _one_of(known: Iterable[str], value: str, key: str, path: Path) -> str:
    """Return the last part of a dotted name, such as ``torch.float16``, when it is a known one."""
    name = value.rpartition(".")[2]
    if name not in known:
        raise ArtifactError(
            f"expected {' or '.join(known)} for {key} in {path / CONFIG_FILE}, got {excerpt(value)!r}: "
            "check that it is a prompt of caikit-nlp's PeftPromptTuning"
        )
    return name


def _inside(path: Path, part: str, name: Any) -> Path:
    """Return the file in the folder that a config names.

    It may be a link, as every file in a cache of the Hub is; what it holds is checked all the same.
    """
    if not isinstance(name, str) or Path(name).name != name or name == "..":
        raise ArtifactError(
            f"expected a file in {path} for {part} in {CONFIG_FILE}, got {excerpt(str(name))!r}, which leads "
            "elsewhere: put the file beside it"
        )
    if not os.path.isfile(path / name):  # which takes a name that is too long for one
        raise ArtifactError(
            f"{CONFIG_FILE} in {path} names {excerpt(name)} for {part}, which is not in it: copy it beside it"
        )
    return path / name


def _check_sizes(recorded: Mapping[str, Any], base: Base, path: Path) -> None:
    here = base.model.config.to_dict()
    for key in _SIZES:
        if key in recorded and key in here and recorded[key] != here[key]:
            raise FingerprintError(
                f"the prompt in {path} was made for a base with {key} {recorded[key]!r}, "
                f"{base.name} has {here[key]!r}; load its own base"
            )


CAIKIT = Format(
    "caikit",
    "a folder with config.yml and encoder.pt, decoder.pt or both",
    _lacks,
    _read,
    _write,
    writes_with_base=True,
    loses=(*USED, *MEASURED, "base_fingerprint"),
)
