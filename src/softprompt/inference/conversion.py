"""Prompts from one format to another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts.bare import check_fit
from softprompt.artifacts.files import require_empty, require_new_file
from softprompt.artifacts.formats import Export, Format, Read, detect, format_named
from softprompt.artifacts.native import StoredAdapter
from softprompt.attach.base_check import check_base
from softprompt.backbone.facts import is_encoder_decoder
from softprompt.backbone.load import LoadedBase, load_base
from softprompt.data.special_frame import SpecialFrame, encode
from softprompt.data.template import Verbalizer
from softprompt.data.tokens import RowTokenizer
from softprompt.errors import ArtifactError, ConfigError, OutputExistsError
from softprompt.inference.requests import Request, fields_of, require_tokens

_TARGET_TOKENS = 128
_NAMING, _REQUESTING = "extended-vocab", "vllm"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted.

    Attributes:
        source: Path of the source.
        source_format: What it was recognised as.
        output: Path of the output.
        output_format: What it was written as.
        base_model: The base that was loaded for it; None when none was.
        facts: What the output format reports.
    """

    source: str
    source_format: str
    output: str
    output_format: str
    base_model: str | None
    facts: Mapping[str, Any]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    base_model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    task_name: str | int | None = None,
    text: Request | None = None,
    name: str | None = None,
    add: Mapping[str, str | Path] | None = None,
    ignore_fingerprint: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write a prompt in another format; the source's own is recognised from its files.

    Args:
        source: Folder or file of the prompt, or ``org/name`` on the Hub.
        destination: New folder or file.
        to: Name of a format; docs/formats.md has the table.
        base_model: Base of the prompt; needed where the source does not name it. A base that is
            loaded is checked against the prompt.
        tokenizer: Used instead of the base model's own.
        torch_dtype: dtype to load the base in; None keeps the checkpoint's.
        device: Such as "cuda:0".
        task_name: Which task of a multitask prompt, by number or name.
        text: Input of the one request that ``vllm`` writes.
        name: What ``extended-vocab`` calls the prompt; None is the name of the source.
        add: Further prompts for ``extended-vocab``, by name.
        ignore_fingerprint: Use a base that the prompt was not made for.
        overwrite: Replace what the destination holds.

    Raises:
        ArtifactError: The source fits no format or is damaged, or the format cannot express it.
        ConfigError: An option is missing, or would be ignored.
        BackboneError: The base cannot be loaded.
        FingerprintError: The base is not the one the prompt was made for.
        OutputExistsError: The destination exists.
    """
    target, output = format_named(to), Path(destination)
    _check_options(target, text, name, add)
    origin = detect(source)
    read = _reader(origin, source)
    _check_output(target, output, overwrite)
    base = None
    options = {"tokenizer": tokenizer, "torch_dtype": torch_dtype, "device": device}
    if base_model is not None:
        base = _load(base_model, target, options)
    stored = read(source, base)
    if base is None and target.writes_with_base:
        base = _load(_recorded_base(stored), target, options)
    elif base is None and any(value is not None for value in options.values()):
        raise ConfigError(
            f"{to} needs no base model here, so tokenizer, torch_dtype and device would be ignored; "
            "leave them out, or name a base_model to check the prompt against"
        )
    others = {other: _read_other(path) for other, path in (add or {}).items()}
    if base is not None:
        for each in (stored, *others.values()):
            check_base(each.manifest, each.location, base.model, ignore=ignore_fingerprint)
            check_fit(each, base)
    export = Export(
        stored=stored,
        to=to,
        task=None if task_name is None else str(task_name),
        name=name or _name_of(source),
        others=others,
        base=base,
        encode=None if base is None else _encoder(base),
        source=None if text is None or base is None else _source_ids(stored, base, text),
        overwrite=overwrite,
    )
    write = cast(Callable[[Export, Path], Mapping[str, Any]], target.write)
    facts = write(export, output)
    return Conversion(
        str(source), origin.name, str(output), to, None if base is None else base.name, facts
    )


def _check_options(
    target: Format, text: Request | None, name: str | None, add: Mapping[str, Any] | None
) -> None:
    if text is not None and target.name != _REQUESTING:
        raise ConfigError(f"text is the input of {_REQUESTING}'s request; {target.name} has none")
    if text is None and target.name == _REQUESTING:
        raise ConfigError("vllm writes the request for one input text; pass text (--text)")
    if (name is not None or add) and target.name != _NAMING:
        raise ConfigError(f"names and further prompts are for {_NAMING}, not for {target.name}")


def _name_of(source: str | Path) -> str:
    path = Path(source).resolve()
    return path.stem if path.is_file() else path.name


def _reader(origin: Format, source: str | Path) -> Read:
    if origin.read is None:
        raise ArtifactError(
            f"{source} is {origin.layout} ({origin.name}), which is only written; convert the "
            "prompt that it was made from"
        )
    return origin.read


def _check_output(target: Format, output: Path, overwrite: bool) -> None:
    """Refuse what may not be written before a base is loaded for it.

    A folder that already is a prompt of another format would be two at once.
    """
    if target.holds == "file":
        require_new_file(output, overwrite=overwrite)
        return
    if not overwrite:
        require_empty(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    try:
        found = detect(output)
    except ArtifactError:
        return
    if found.read is not target.read:
        raise OutputExistsError(
            f"{output} holds a prompt in the format {found.name}, and would be two at once; choose "
            "another folder"
        )


def _read_other(path: str | Path) -> StoredAdapter:
    origin = detect(path)
    if origin.reads_with_base:
        raise ConfigError(
            f"{path} ({origin.name}) does not name its base; convert it to softprompt first"
        )
    return _reader(origin, path)(path, None)


def _recorded_base(stored: StoredAdapter) -> str:
    recorded = stored.manifest.base_model if stored.manifest else None
    found = recorded or stored.config.get("base_model_name_or_path")
    if not found:
        raise ArtifactError(
            f"{stored.location} does not say which base model it is for; pass base_model"
        )
    return str(found)


def _load(
    base_model: str | Path | PreTrainedModel, target: Format, options: Mapping[str, Any]
) -> LoadedBase:
    base = load_base(base_model, **options)
    if target.name == _NAMING and isinstance(base_model, PreTrainedModel):
        # The export changes the model it saves.
        return replace(base, model=copy.deepcopy(base.model))
    return base


def _encoder(base: LoadedBase) -> Callable[[str], tuple[int, ...]]:
    """Return what gives the ids of a text as rows have them: framed, without EOS in causal models."""
    frame = SpecialFrame.of(base.tokenizer)
    if not is_encoder_decoder(base.model):
        frame = SpecialFrame(frame.prefix, ())

    def ids(text: str) -> tuple[int, ...]:
        return frame.around(encode(base.tokenizer, [text], special=False)[0])

    return ids


def _source_ids(stored: StoredAdapter, base: LoadedBase, text: Request) -> tuple[int, ...]:
    manifest = stored.manifest
    verbalizer = Verbalizer(manifest.template if manifest else "{{input}}")
    rows = RowTokenizer(
        base.tokenizer,
        verbalizer,
        max_source_length=manifest.max_source_length if manifest else 10**9,
        max_target_length=manifest.max_target_length if manifest else _TARGET_TOKENS,
        seq2seq=is_encoder_decoder(base.model),
    )
    ids, _ = rows.source(fields_of(text, verbalizer.fields))
    require_tokens([ids])
    return ids
