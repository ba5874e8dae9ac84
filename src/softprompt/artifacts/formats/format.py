"""What a format is, what every writer starts from (an ``Export``), and the formats of PEFT's folder.

``softprompt`` and ``peft`` are the folder of ``save_adapter``, with and without what PEFT lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.artifacts import (
    MANIFEST_NAME,
    MOST_TEXT_BYTES,
    PICKLED_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Manifest,
    Origin,
    StoredPrompt,
    check_tensors,
    check_width,
    load_adapter,
    manifest_of,
    parse_object,
    read_bytes,
    require_new_file,
    save_adapter,
    write_atomically,
)
from softprompt.backbone import Base
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import CONFIG_NAME, PROMPT_KEY, PeftType, Placement, Prompt, PromptTuningConfig, TaskType

ENCODER: str = "ENCODER"
DECODER: str = "DECODER"
FRONT = (Placement.PREFIX,)
"""The placement that every format of virtual tokens holds."""
Encode = Callable[[str], tuple[int, ...]]
"""The ids of a text as they stand behind a prompt, special tokens included."""
Ask = Callable[[StoredPrompt, Mapping[str, Any]], tuple[tuple[int, ...], int]]
"""The ids of a request to a prompt, never cut, and how many of them stand before its virtual tokens."""


@dataclass(frozen=True, slots=True)
class Export:
    """A prompt to write, and the base, names and text that some formats need.

    Attributes:
        stored: The prompt, as it was read.
        to: Name of the format that is written.
        task: Which task of a multitask prompt.
        name: What the prompt is called in the output.
        others: Further prompts for the same base, by name.
        base: The base model; None where no format needs it.
        encode: Ids of a text for this base.
        ask: Ids of requests for this base.
        source: Ids of the input of one request.
        at: How many of them stand before the prompt.
        overwrite: Whether the output may replace what is there.
    """

    stored: StoredPrompt
    to: str
    task: str | None = None
    name: str = "prompt"
    others: Mapping[str, StoredPrompt] = field(default_factory=dict)
    base: Base | None = None
    encode: Encode | None = None
    ask: Ask | None = None
    source: tuple[int, ...] | None = None
    at: int = 0
    overwrite: bool = False

    def single(self) -> StoredPrompt:
        """Return the one task that formats of virtual tokens can hold.

        Raises:
            ConfigError: A multitask prompt without a task, or a task of another prompt.
        """
        return self.stored.of_task(self.task)

    def prompt(self, placements: Collection[Placement] = FRONT) -> Prompt:
        """Return the virtual tokens to write, in their stored dtype.

        Args:
            placements: Those that the format holds.

        Raises:
            ArtifactError: This format cannot express the prompt.
            ConfigError: As for ``single``.
        """
        return plain_prompt(self.single(), self.to, placements)

    def input_tokens(self, placements: Collection[Placement] = FRONT) -> Tensor:
        """Return the virtual tokens ``[P, H]`` of the input, for formats that hold only one tensor.

        Raises:
            ArtifactError: As for ``prompt``, or the prompt has virtual tokens before the decoder's input.
            ConfigError: As for ``single``.
        """
        return input_tokens(self.prompt(placements), self.stored.location)

    def loaded(self) -> Base:
        """Return the base model.

        Raises:
            ConfigError: None was given.
        """
        if self.base is None:
            raise ConfigError(f"{self.to} needs the base model of the prompt; pass base_model (--base-model)")
        return self.base


Lacks = Callable[[Path], str | None]
Source = str | Path
"""A path; only folders of PEFT's layout may be hub ids, which stay text."""
Read = Callable[[Source, Base | None], StoredPrompt]
Write = Callable[[Export, Path], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Format:
    """One entry of the table of formats.

    Attributes:
        name: What ``--to`` calls it.
        layout: The files, for errors.
        lacks: Returns what a path lacks to be of this format, None when it is.
        read: Reads a path of this format; None for formats that are only written.
        write: Writes a prompt and returns facts for the report; None for formats that are only read.
        reads_with_base: Whether reading needs the base model.
        writes_with_base: Whether writing needs the base model.
        holds: Whether the output is a ``folder`` or a ``file``.
        loses: Fields of ``softprompt.json`` that the format cannot hold.
    """

    name: str
    layout: str
    lacks: Lacks
    read: Read | None
    write: Write | None
    reads_with_base: bool = False
    writes_with_base: bool = False
    holds: str = "folder"
    loses: tuple[str, ...] = ()

    def lost(self, manifest: Manifest | None, origin: Format) -> tuple[str, ...]:
        """Return the fields of a manifest that the original format holds and this one loses."""
        if manifest is None:
            return ()
        fewer = (name for name in self.loses if name not in origin.loses)
        return tuple(name for name in fewer if getattr(manifest, name) not in _NOTHING)


MEASURED: tuple[str, ...] = ("metrics", "history", "settings", "data")
"""Fields about training and its results."""

USED: tuple[str, ...] = ("task", "labels", "max_source_length", "max_target_length")
"""Fields about using a prompt, besides its template."""

_NOTHING: tuple[Any, ...] = (None, (), {}, [], "generation")
"""Values whose loss is none; generation is the default of every format."""


def write_failed(path: Path, error: Exception) -> ArtifactError:
    """Return the error for an output that could not be written."""
    return ArtifactError(
        f"could not write {path} ({error}); nothing there was changed: free some space or choose another path"
    )


def write_output_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write an output of one file.

    Raises:
        OutputExistsError: it exists and may not be overwritten.
        ArtifactError: the file system failed.
    """
    require_new_file(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise write_failed(path, error) from error


def plain_prompt(stored: StoredPrompt, kind: str, placements: Collection[Placement] = FRONT) -> Prompt:
    """Return the virtual tokens of a prompt of one task for a format that holds nothing else than ``placements``.

    Raises:
        ArtifactError: virtual tokens alone would be another model than this prompt, with the reason.
    """
    reason = _inexpressible(stored, placements)
    if reason is not None:
        raise ArtifactError(f"{stored.location} cannot be written as {kind}: {reason}")
    return stored.prompt()


def input_tokens(prompt: Prompt, where: str) -> Tensor:
    """Return virtual tokens ``[P, H]`` of the input, for formats that hold only one tensor.

    Raises:
        ArtifactError: The prompt has virtual tokens before the decoder's input.
    """
    if prompt.input is None or prompt.decoder is not None:
        raise ArtifactError(
            f"{where} has virtual tokens for the decoder of a seq2seq model, which this format "
            "cannot hold; convert it to caikit or tgis"
        )
    return prompt.input


def stored_of_parts(parts: Mapping[str, Tensor], origin: Origin, base: Base | None, where: str) -> StoredPrompt:
    """Return virtual tokens as a prompt, with the configuration that PEFT's folder needs.

    Args:
        parts: checked virtual tokens ``[P, H]`` for ENCODER, DECODER or both; a causal model's are DECODER.
        origin: what is known of them.
        base: gives the fingerprint and the width; None checks neither.
        where: the file or folder, for errors.

    Raises:
        ArtifactError: the parts do not fit the kind of base, each other, or the base's width.
    """
    wanted = (ENCODER, DECODER) if origin.seq2seq else (DECODER,)
    if not parts or not set(parts) <= set(wanted):
        raise ArtifactError(
            f"expected virtual tokens for {' or '.join(wanted)} in {where}, as {origin.base_model} is a "
            f"{'seq2seq' if origin.seq2seq else 'causal'} model, got {', '.join(parts) or 'none'}: "
            "check the base model"
        )
    ordered = [parts[name] for name in wanted if name in parts]
    shapes = {tuple(tokens.shape) for tokens in ordered}
    if len(shapes) > 1:
        raise ArtifactError(
            f"expected virtual tokens of one shape for encoder and decoder in {where}, got "
            f"{' and '.join(str(list(tokens.shape)) for tokens in ordered)}: convert them one by one"
        )
    length, width = ordered[0].shape
    if base is not None:
        check_width(width, base, where)
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if origin.seq2seq else TaskType.CAUSAL_LM,
        num_virtual_tokens=length,
        token_dim=width,
        num_transformer_submodules=len(ordered),
        output_model_types=[name for name in wanted if name in parts] if origin.seq2seq else None,
        base_model_name_or_path=origin.base_model,
        inference_mode=True,
        # PEFT reads a seq2seq prompt's layers and heads from its config.
        num_layers=None if base is None else base.facts.num_layers,
        num_attention_heads=None if base is None else base.facts.num_attention_heads,
    ).to_dict()
    tensors = {PROMPT_KEY: torch.cat(ordered)}
    check_tensors(config, tensors, where)
    return StoredPrompt(config, tensors, manifest_of(origin, base), where)


def _inexpressible(stored: StoredPrompt, placements: Collection[Placement]) -> str | None:
    config = stored.config
    placement = config.get("placement", Placement.PREFIX)
    if config.get("task_type") not in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        return f"it is for {config.get('task_type')}, the format for models that write text"
    more = stored.beyond_tokens()
    if more is not None:
        return f"{more}; only peft holds those (mlx-lm holds keys and values)"
    if placement not in placements:
        more = " or into a chat's system turn" if Placement.CHAT_SYSTEM in placements else ""
        return (
            f"the format puts virtual tokens before the input{more}, this prompt stands elsewhere ({placement}); "
            "train with placement prefix (--placement prefix)"
        )
    if not config.get("prompt_sees_input", True):
        return "the format lets the prompt attend to the input, this one does not (prompt_sees_input)"
    return None


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
    text = read_bytes(path / CONFIG_NAME, MOST_TEXT_BYTES).decode(errors="replace")
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
    "softprompt", f"a folder with {CONFIG_NAME}, {WEIGHTS_NAME} and {MANIFEST_NAME}", _lacks_ours, _read, _write
)
PEFT = Format(
    "peft",
    f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME} (or {PICKLED_WEIGHTS_NAME})",
    _lacks_folder,
    _read,
    _write_for_peft,
)
