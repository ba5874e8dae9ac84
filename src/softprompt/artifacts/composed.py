"""Composition of stored prompts of one base: average, concatenation, difference, as new folders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.peft_folder import load_adapter, save_adapter
from softprompt.artifacts.stored_prompt import StoredPrompt, other_base
from softprompt.errors import ConfigError, FingerprintError, nearest
from softprompt.prompts import (
    KEY_VALUE_METHODS,
    PROMPT_KEY,
    PeftType,
    PromptTuningConfig,
    average,
    concatenation,
    difference,
    resized,
    shifted,
)

logger = logging.getLogger(__name__)

_INHERITED = ("template", "task", "labels", "max_source_length", "max_target_length", "dtype")
"""Fields of ``softprompt.json`` that the result has from one of the prompts."""
_OF_THE_BASE = ("base_model", "base_fingerprint", "seq2seq")
_READ_BY_EVALUATION = ("input_field", "output_field")
_INITIALISATION = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
_SIZES = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def average_prompts(
    prompts: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    num_virtual_tokens: int | None = None,
    template_from: str | Path | None = None,
    overwrite: bool = False,
) -> StoredPrompt:
    """Average stored prompts, virtual token by virtual token.

    Args:
        prompts: Folders, or names on the Hub, of two prompts or more.
        output: Folder to write the result to; None writes nothing.
        weights: One number of 0 or more for each prompt; None weighs all the same.
        num_virtual_tokens: Resize all to this length first; prompts of unlike lengths need it.
        template_from: The one of ``prompts`` whose template, labels, limits and dtype the result gets;
            required when they differ.
        overwrite: Write into a folder that is not empty.

    Raises:
        ConfigError: Lengths, templates or options differ, or the weights cannot be used.
        FingerprintError: The prompts are of different bases.
        ArtifactError: A folder cannot be read or composed.
        OutputExistsError: The output is not empty.
    """
    members = _members(prompts)
    values = [member.virtual_tokens() for member in members]
    if num_virtual_tokens is not None:
        values = [resized(each, num_virtual_tokens) for each in values]
    mean = average(values, weights)
    how: dict[str, Any] = {"operation": "average"}
    how |= {} if weights is None else {"weights": [float(each) for each in weights]}
    how |= {} if num_virtual_tokens is None else {"num_virtual_tokens": num_virtual_tokens}
    return _written(_result(members, mean, how, template_from), output, overwrite)


def concatenate_prompts(
    prompts: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    template_from: str | Path | None = None,
    overwrite: bool = False,
) -> StoredPrompt:
    """Concatenate the virtual tokens of stored prompts; see ``average_prompts``.

    Prompts of keys and values (all cartridges, or all prefixes) stand side by side in every layer: the base reads
    them as if it had read all their texts. Those that were trained apart answer worse so than alone
    (arXiv:2606.04557), so a warning says to measure the result.

    Raises:
        ConfigError: Templates or options differ, or the sizes of keys and values.
        FingerprintError: The prompts are of different bases.
        ArtifactError: A folder cannot be read or composed.
        OutputExistsError: The output is not empty.
    """
    members = _members(prompts)
    if members[0].config["peft_type"] in KEY_VALUE_METHODS:
        return _written(_side_by_side(members, _pattern(members, template_from)), output, overwrite)
    joined = concatenation([member.virtual_tokens() for member in members])
    result = _result(members, joined, {"operation": "concatenation"}, template_from)
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
) -> StoredPrompt:
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
    members = _members([first, second, *([] if onto is None else [onto])])
    values = [member.virtual_tokens() for member in members]
    change = difference(values[0], values[1])
    start = change.new_zeros(change.shape) if onto is None else values[2]
    how = {"operation": "difference", "scale": float(scale), "added_to_last": onto is not None}
    result = _result(members, shifted(start, change, scale), how, template_from)
    return _written(result, output, overwrite)


def _members(prompts: Sequence[str | Path]) -> list[StoredPrompt]:
    """Read prompts that can be composed: of one base, with the same options."""
    listed = [prompts] if isinstance(prompts, str | Path) else prompts
    if len(listed) < 2:
        named = ", ".join(map(str, listed)) or "none"
        raise ConfigError(f"expected 2 prompts or more, got {named}; name their folders")
    first, *others = [load_adapter(each) for each in listed]
    for other in others:
        if first.keys_and_values != other.keys_and_values:
            keyed, plain = (first, other) if first.keys_and_values else (other, first)
            raise ConfigError(
                f"{keyed.location} is keys and values of every layer, {plain.location} is virtual tokens of the "
                "input; only prompts of one kind can be composed"
            )
        reason = other_base(first, other)
        if reason is not None:
            raise FingerprintError(
                f"{other.location} cannot go together with {first.location}: {reason}; use prompts of one base"
            )
        if other.options != first.options:
            raise ConfigError(
                f"{first.location} has the options {first.options or 'of PEFT alone'}, "
                f"{other.location} has {other.options or 'those of PEFT alone'}; only prompts that "
                "are used in the same way can be composed"
            )
    return [first, *others]


def _result(
    members: Sequence[StoredPrompt], values: Tensor, how: dict[str, Any], template_from: str | Path | None
) -> StoredPrompt:
    """Return virtual tokens ``[S, P, H]`` as an unsaved prompt that records what it was made of."""
    pattern = _pattern(members, template_from)
    known = PromptTuningConfig.__dataclass_fields__.keys()
    # How the members were initialised says nothing about the result.
    kept = {k: v for k, v in pattern.config.items() if k in known and k not in _INITIALISATION}
    kept |= {
        "num_virtual_tokens": values.shape[1],
        "num_transformer_submodules": values.shape[0],
        "inference_mode": True,
    }
    manifest = pattern.manifest and _manifest(pattern.manifest, members, how)
    if manifest is None:
        logger.warning("none of the prompts has a softprompt.json, so the result does not say what it was made of")
    flat = values.reshape(-1, values.shape[2]).contiguous()  # [S*P, H]
    return StoredPrompt(PromptTuningConfig(**kept).to_dict(), {PROMPT_KEY: flat}, manifest, "")


def _pattern(members: Sequence[StoredPrompt], template_from: str | Path | None) -> StoredPrompt:
    """Return the member whose manifest the result inherits.

    Raises:
        ConfigError: If manifests differ and none was chosen, or the choice is not among them.
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
        for name, mine, its in zip(_INHERITED, _inherited(first), _inherited(other), strict=True):
            if mine != its:
                raise ConfigError(
                    f"the prompts differ in {name}: {mine!r} in {first.location}, {its!r} in "
                    f"{other.location}; choose one with --template-from (template_from=... in Python)"
                )
    return first


def _inherited(stored: StoredPrompt) -> tuple[Any, ...]:
    values = {name: getattr(stored.manifest, name, None) for name in _INHERITED}
    if values["labels"]:
        values["labels"] = sorted(values["labels"])
    return tuple(values.values())


def _manifest(pattern: Manifest, members: Sequence[StoredPrompt], how: dict[str, Any]) -> Manifest:
    """Return the manifest of the result: nothing was measured yet."""
    settings = {key: pattern.settings[key] for key in _READ_BY_EVALUATION if key in pattern.settings}
    made_of = {
        str(number): {
            "prompt": member.location,
            "weights_sha256": member.manifest.weights_sha256 if member.manifest else None,
        }
        for number, member in enumerate(members, start=1)
    }
    kept = {name: getattr(pattern, name) for name in (*_INHERITED, *_OF_THE_BASE)}
    return Manifest(**kept, settings=settings | {"composition": how}, data={"made_of": made_of})


def _written(result: StoredPrompt, output: str | Path | None, overwrite: bool) -> StoredPrompt:
    if output is None:
        if overwrite:
            raise ConfigError("overwrite has no meaning without output; name an output directory")
        return result
    target = Path(output)
    save_adapter(target, result.config, result.tensors, result.manifest, overwrite=overwrite)
    return replace(result, location=str(target))


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Put the virtual tokens of cartridges one after the other; PEFT's helper under its name.

    The first cartridge's frozen tokens stay frozen, and its template and record are taken over; see
    ``concatenate_prompts`` for what to expect of it.

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
    members = _members(adapter_paths)
    for member in members:
        kind = member.config["peft_type"]
        if kind != PeftType.CARTRIDGE:
            raise ConfigError(f"Adapter at '{member.location}' is not a CARTRIDGE adapter (got {kind}).")
    _written(_side_by_side(members, members[0]), output_path, overwrite=True)


def _side_by_side(members: Sequence[StoredPrompt], pattern: StoredPrompt) -> StoredPrompt:
    """Return prompts of keys and values one after the other, with the record of one of them.

    Raises:
        ConfigError: If they are of different methods or sizes.
    """
    first = members[0]
    for member in members:
        for name in ("peft_type", *_SIZES):
            mine, its = first.config.get(name), member.config.get(name)
            if mine != its:
                raise ConfigError(
                    f"Incompatible {first.config['peft_type']} configs for attribute '{name}': {mine!r} in "
                    f"{first.location}, {its!r} in {member.location}"
                )
    logger.warning(
        "%d prompts of keys and values side by side usually answer worse than each alone; training them with "
        "distractors may help (arXiv:2606.04557; docs/distillation.md measures it): evaluate the result",
        len(members),
    )
    values = concatenation([member.values for member in members])
    config = first.config | {"num_virtual_tokens": values.shape[0]}
    manifest = pattern.manifest and _manifest(pattern.manifest, members, {"operation": "concatenation"})
    return StoredPrompt(config, {PROMPT_KEY: values}, manifest, "")
