"""New prompts from stored ones of the same base, as folders that say what they were made of."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.artifacts.files import require_empty
from softprompt.artifacts.layout import PROMPT_KEY, config_json, parse_object
from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter, load_adapter, save_adapter
from softprompt.artifacts.parts import options_of, require_one_base, rows_of
from softprompt.errors import ConfigError, nearest
from softprompt.prompts import PeftType, PromptTuningConfig, composition

logger = logging.getLogger(__name__)

_READ_BY_EVALUATION = ("input_field", "output_field")


def average_prompts(
    prompts: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    num_virtual_tokens: int | None = None,
    template_from: str | Path | None = None,
    overwrite: bool = False,
) -> StoredAdapter:
    """Average stored prompts row by row.

    Args:
        prompts: Folders, or names on the Hub, of two prompts or more.
        output: Folder to write the result to; None writes nothing.
        weights: One number of 0 or more for each prompt; None weighs all the same.
        num_virtual_tokens: Resize all to this length first; prompts of unlike lengths need it.
        template_from: The one of ``prompts`` whose template, labels, limits and dtype the result gets;
            needed when they differ.
        overwrite: Write into a folder that is not empty.

    Raises:
        ConfigError: Lengths, templates or options differ, or the weights cannot be used.
        FingerprintError: The prompts are of different bases.
        ArtifactError: A folder cannot be read or composed.
        OutputExistsError: The output is not empty.
    """
    members = _members(prompts, 2)
    rows = [rows_of(member) for member in members]
    if num_virtual_tokens is not None:
        rows = [composition.resized(each, num_virtual_tokens) for each in rows]
    mean = composition.average(rows, weights)
    how: dict[str, Any] = {"operation": "average"}
    how |= {} if weights is None else {"weights": [float(each) for each in weights]}
    how |= {} if num_virtual_tokens is None else {"num_virtual_tokens": num_virtual_tokens}
    result = _result(members, mean, how, template_from)
    return _written(result, output, overwrite)


def concatenate_prompts(
    prompts: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    template_from: str | Path | None = None,
    overwrite: bool = False,
) -> StoredAdapter:
    """Put the rows of stored prompts one after the other; see ``average_prompts``."""
    members = _members(prompts, 2)
    rows = composition.concatenation([rows_of(member) for member in members])
    result = _result(members, rows, {"operation": "concatenation"}, template_from)
    return _written(result, output, overwrite)


def subtract_prompts(
    first: str | Path,
    second: str | Path,
    output: str | Path | None = None,
    *,
    onto: str | Path | None = None,
    scale: float = 1.0,
    template_from: str | Path | None = None,
    overwrite: bool = False,
) -> StoredAdapter:
    """Return ``scale * (first - second)``, added to the prompt ``onto`` where one is named.

    Args:
        first: A prompt.
        second: The prompt to subtract, of the same length.
        output: Folder to write the result to; None writes nothing.
        onto: The prompt to add the difference to; None leaves the difference by itself.
        scale: Factor of the difference.
        template_from: See ``average_prompts``.
        overwrite: Write into a folder that is not empty.

    Raises:
        ConfigError: Shapes, templates or options differ, or the scale is not finite.
        FingerprintError: The prompts are of different bases.
        ArtifactError: A folder cannot be read or composed.
        OutputExistsError: The output is not empty.
    """
    members = _members([first, second, *([] if onto is None else [onto])], 2)
    rows = [rows_of(member) for member in members]
    change = composition.difference(rows[0], rows[1])
    start = change.new_zeros(change.shape) if onto is None else rows[2]
    how = {"operation": "difference", "scale": float(scale), "added_to_last": onto is not None}
    result = _result(members, composition.shifted(start, change, scale), how, template_from)
    return _written(result, output, overwrite)


def _members(prompts: Sequence[str | Path], least: int) -> list[StoredAdapter]:
    """Read prompts that can be put together: of one base, with the same options."""
    if isinstance(prompts, str | Path) or len(prompts) < least:
        listed = [prompts] if isinstance(prompts, str | Path) else prompts
        named = ", ".join(map(str, listed)) or "none"
        raise ConfigError(f"expected {least} prompts or more, got {named}; name their folders")
    members = [load_adapter(each) for each in prompts]
    for other in members[1:]:
        require_one_base(members[0], other)
        if options_of(other) != options_of(members[0]):
            raise ConfigError(
                f"{members[0].location} has the options {options_of(members[0]) or 'of PEFT alone'}, "
                f"{other.location} has {options_of(other) or 'those of PEFT alone'}; only prompts that "
                "are used in the same way can be composed"
            )
    return members


def _result(
    members: Sequence[StoredAdapter],
    rows: Tensor,
    how: dict[str, Any],
    template_from: str | Path | None,
) -> StoredAdapter:
    """Return rows ``[S, P, H]`` as an unsaved prompt that records what it was made of."""
    pattern = _pattern(members, template_from)
    known = PromptTuningConfig.__dataclass_fields__.keys()
    kept = {key: value for key, value in pattern.config.items() if key in known}
    # Where the members' rows came from says nothing about these.
    for name in (
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    ):
        kept.pop(name, None)
    kept |= {
        "num_virtual_tokens": rows.shape[1],
        "num_transformer_submodules": rows.shape[0],
        "inference_mode": True,
    }
    config = PromptTuningConfig(**kept).to_dict()
    manifest = pattern.manifest and _manifest(pattern.manifest, members, how)
    if manifest is None:
        logger.warning(
            "none of the prompts has a softprompt.json, so the result does not say what it was made of"
        )
    values = rows.reshape(-1, rows.shape[2]).contiguous()
    return StoredAdapter(
        parse_object(config_json(config), "config"), {PROMPT_KEY: values}, manifest, ""
    )


def _pattern(members: Sequence[StoredAdapter], template_from: str | Path | None) -> StoredAdapter:
    """Return the member whose record the result takes over.

    Raises:
        ConfigError: If records differ and none was chosen, or the choice is not among them.
    """
    if template_from is not None:
        found = load_adapter(template_from).location
        names = [member.location for member in members]
        if found not in names:
            raise ConfigError(
                f"template_from is one of the prompts themselves ({', '.join(names)}), got "
                f"{found}{nearest(found, names)}"
            )
        return members[names.index(found)]
    recorded = [member for member in members if member.manifest is not None]
    first = recorded[0] if recorded else members[0]
    for other in recorded[1:]:
        for name, mine, its in zip(_RECORD, _record(first), _record(other), strict=True):
            if mine != its:
                raise ConfigError(
                    f"the prompts differ in {name}: {mine!r} in {first.location}, {its!r} in "
                    f"{other.location}; choose one with --template-from (template_from=... in Python)"
                )
    return first


_RECORD = ("template", "task", "labels", "max_source_length", "max_target_length", "dtype")


def _record(stored: StoredAdapter) -> tuple[Any, ...]:
    values = {name: getattr(stored.manifest, name, None) for name in _RECORD}
    if values["labels"]:
        values["labels"] = sorted(values["labels"])
    return tuple(values.values())


def _manifest(pattern: Manifest, members: Sequence[StoredAdapter], how: dict[str, Any]) -> Manifest:
    """Return the record of the result: nothing was measured yet."""
    settings = {
        key: pattern.settings[key] for key in _READ_BY_EVALUATION if key in pattern.settings
    }
    made_of = {
        str(number): {
            "prompt": member.location,
            "weights_sha256": member.manifest.weights_sha256 if member.manifest else None,
        }
        for number, member in enumerate(members, start=1)
    }
    fresh = Manifest(
        template=pattern.template,
        task=pattern.task,
        labels=pattern.labels,
        base_model=pattern.base_model,
        base_fingerprint=pattern.base_fingerprint,
        max_source_length=pattern.max_source_length,
        max_target_length=pattern.max_target_length,
        dtype=pattern.dtype,
        seq2seq=pattern.seq2seq,
    )
    return replace(fresh, settings=settings | {"composition": how}, data={"made_of": made_of})


def _written(result: StoredAdapter, output: str | Path | None, overwrite: bool) -> StoredAdapter:
    if output is None:
        if overwrite:
            raise ConfigError("overwrite has no meaning without output; name an output directory")
        return result
    target = Path(output)
    if not overwrite:
        require_empty(target)
    save_adapter(target, result.config, result.tensors, result.manifest, overwrite=overwrite)
    return replace(result, location=str(target))


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path],
    *,
    output_path: str | Path,
    safe_serialization: bool = True,
) -> None:
    """Put the virtual tokens of cartridges one after the other; PEFT's helper under its name.

    The first cartridge's frozen tokens stay frozen, and its template and record are taken over. Cartridges
    that were trained apart may answer worse side by side than alone: measure the result.

    Args:
        adapter_paths: Folders of two cartridges or more, of one base.
        output_path: Folder to write to; a prompt in it is replaced.
        safe_serialization: Must stay True, no pickle is written.

    Raises:
        ConfigError: If there are fewer than two, or they do not fit together.
        FingerprintError: The cartridges are of different bases.
        ArtifactError: A folder cannot be read, or holds no cartridge.
    """
    if not safe_serialization:
        raise ConfigError("safe_serialization=False would write a pickle; leave it out")
    members = _members(adapter_paths, 2)
    first = members[0]
    for member in members:
        if member.config["peft_type"] != PeftType.CARTRIDGE:
            raise ConfigError(
                f"Adapter at '{member.location}' is not a CARTRIDGE adapter (got {member.config['peft_type']})."
            )
        for name in _CARTRIDGE_SIZES:
            if member.config.get(name) != first.config.get(name):
                raise ConfigError(
                    f"Incompatible CARTRIDGE configs for attribute '{name}': {first.config.get(name)!r} in "
                    f"{first.location}, {member.config.get(name)!r} in {member.location}"
                )
    values = composition.concatenation([member.prompt for member in members])
    config = first.config | {"num_virtual_tokens": values.shape[0]}
    how = {"operation": "concatenation"}
    manifest = first.manifest and _manifest(first.manifest, members, how)
    save_adapter(Path(output_path), config, {PROMPT_KEY: values}, manifest, overwrite=True)


_CARTRIDGE_SIZES = (
    "task_type",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "num_transformer_submodules",
)
