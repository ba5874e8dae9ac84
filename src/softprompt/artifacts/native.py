"""The one artifact: PEFT's prompt-tuning folder, written whole or not at all, checked when read.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's and load in PEFT unchanged;
``softprompt.json`` and ``README.md`` stand beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor

from softprompt.artifacts.card import is_own_card, model_card
from softprompt.artifacts.files import (
    read_bytes,
    require_empty,
    require_no_file,
    write_folder,
)
from softprompt.artifacts.layout import (
    CARD_NAME,
    MANIFEST_NAME,
    PICKLED_WEIGHTS_NAME,
    PROMPT_KEY,
    WEIGHTS_NAME,
    check_config,
    check_tensors,
    config_json,
    parse_object,
)
from softprompt.artifacts.location import locate
from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.pickles import damaged, load_pickled
from softprompt.errors import ArtifactError
from softprompt.prompts import CONFIG_NAME


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A prompt as read from disk.

    ``config`` is ``adapter_config.json``; ``tensors`` are on the CPU in their stored dtype;
    ``manifest`` is None for a folder that PEFT wrote; ``location`` is the folder.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    manifest: Manifest | None
    location: str

    @property
    def base_model(self) -> str | None:
        """Name or path of the base, from our record or else from PEFT's config; None when not known."""
        recorded = self.manifest.base_model if self.manifest else None
        name = recorded or self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def prompt(self) -> Tensor:
        """The prompt's rows ``[P*S, H]``."""
        return self.tensors[PROMPT_KEY]


def save_adapter(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    manifest: Manifest | None = None,
    *,
    overwrite: bool,
) -> None:
    """Write a prompt as PEFT's folder, plus manifest and model card, all of it or nothing.

    Args:
        directory: new or empty, unless ``overwrite``; unrelated files in it stay.
        config: PEFT's keys and plain values, as ``PromptTuningConfig.to_dict()`` gives them.
        tensors: ``prompt_embeddings`` ``[P*S, H]`` and heads under PEFT's names.
        manifest: what goes into ``softprompt.json``; None writes none.
        overwrite: replace the prompt that ``directory`` holds; a README.md that softprompt did
            not write is left as it is.

    Raises:
        OutputExistsError: the directory is not empty, or is a file.
        ArtifactError: values that could not be read back, or the file system refused.
    """
    directory = Path(directory)
    if overwrite:
        require_no_file(directory)
    else:
        require_empty(directory)
    config_text = config_json(config)
    check_config(config)
    check_tensors(config, tensors, "the tensors to save")
    # clone(): safetensors refuses tensors that share storage, as tied heads do.
    dense = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    weights = bytes_from_tensors(dense, metadata={"format": "pt"})
    files = {WEIGHTS_NAME: weights, CONFIG_NAME: config_text.encode()}
    if manifest is not None:
        digest = hashlib.sha256(weights).hexdigest()
        manifest = dataclasses.replace(manifest, weights_sha256=digest)
        files[MANIFEST_NAME] = manifest.to_json().encode()
    card = directory / CARD_NAME
    # save_pretrained(".") in a project must not cost the user the project's own README.
    if not card.is_file() or is_own_card(read_bytes(card).decode(errors="replace")):
        files[CARD_NAME] = model_card(config, manifest).encode()
    try:
        write_folder(directory, files, stale=(PICKLED_WEIGHTS_NAME, MANIFEST_NAME))
    except OSError as error:
        raise ArtifactError(
            f"could not write the prompt to {directory} ({error}); nothing there was changed: "
            "free some space or choose another directory"
        ) from error


def load_adapter(
    directory_or_hub_id: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> StoredAdapter:
    """Read and check a prompt that softprompt or PEFT wrote.

    Args:
        directory_or_hub_id: a folder, or ``org/name`` on the Hugging Face Hub.
        subfolder: a named adapter's folder inside it.
        revision: a branch, tag or commit, for hub ids only.

    Raises:
        ArtifactError: missing, damaged, or not a prompt-tuning adapter; one line says which.
    """
    directory = locate(directory_or_hub_id, subfolder, revision)
    config_path = directory / CONFIG_NAME
    if not config_path.is_file():
        raise ArtifactError(
            f"expected {CONFIG_NAME} in {directory}, it has none: pass the folder that "
            "save_pretrained or `softprompt tune` wrote"
        )
    config = parse_object(read_bytes(config_path).decode(errors="replace"), str(config_path))
    check_config(config)
    manifest = _read_manifest(directory / MANIFEST_NAME)
    tensors, path = _read_tensors(directory, manifest)
    check_tensors(config, tensors, str(path))
    return StoredAdapter(config, tensors, manifest, str(directory))


def adapter_of_files(files: Mapping[str, bytes], name: str) -> StoredAdapter:
    """Check a prompt whose files were read already; pickled weights are not looked at.

    Args:
        files: the content of ``adapter_config.json``, ``adapter_model.safetensors`` and, where
            there is one, ``softprompt.json``.
        name: stands for the folder in messages.

    Raises:
        ArtifactError: a file is missing, damaged, or not a prompt-tuning adapter's.
    """
    where = Path(name)
    for needed in (CONFIG_NAME, WEIGHTS_NAME):
        if needed not in files:
            raise ArtifactError(f"expected {needed} in {name}, it has none: copy it there")
    config = parse_object(files[CONFIG_NAME].decode(errors="replace"), str(where / CONFIG_NAME))
    check_config(config)
    record = files.get(MANIFEST_NAME)
    manifest = None if record is None else _manifest_of(record, where / MANIFEST_NAME)
    path = where / WEIGHTS_NAME
    tensors = _tensors_of(files[WEIGHTS_NAME], path, manifest)
    check_tensors(config, tensors, str(path))
    return StoredAdapter(config, tensors, manifest, name)


def _read_manifest(path: Path) -> Manifest | None:
    return _manifest_of(read_bytes(path), path) if path.is_file() else None


def _manifest_of(data: bytes, path: Path) -> Manifest:
    try:
        return Manifest.from_dict(parse_object(data.decode(errors="replace"), path.name))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _read_tensors(directory: Path, manifest: Manifest | None) -> tuple[dict[str, Tensor], Path]:
    path = directory / WEIGHTS_NAME
    if path.is_file():
        return _tensors_of(read_bytes(path), path, manifest), path
    path = directory / PICKLED_WEIGHTS_NAME
    if path.is_file():
        return _unpickled(path), path
    raise ArtifactError(
        f"expected {WEIGHTS_NAME} (or {PICKLED_WEIGHTS_NAME}) in {directory}, it has neither: "
        "copy the weights beside adapter_config.json"
    )


def _tensors_of(data: bytes, path: Path, manifest: Manifest | None) -> dict[str, Tensor]:
    try:
        tensors = tensors_from_bytes(data)
    # A damaged header can fail in the parser, in the dtype table or in torch.
    except Exception as error:
        raise damaged(path, len(data), error) from error
    _check_digest(path, data, manifest)
    return tensors


def _check_digest(path: Path, data: bytes, manifest: Manifest | None) -> None:
    expected = manifest.weights_sha256 if manifest else None
    came = hashlib.sha256(data).hexdigest()
    if expected is not None and came != expected:
        raise ArtifactError(
            f"expected {path} with sha256 {expected[:12]}… ({MANIFEST_NAME}), came {came[:12]}…: "
            f"restore the weights, or delete {MANIFEST_NAME} if they were replaced on purpose"
        )


def _unpickled(path: Path) -> dict[str, Tensor]:
    loaded = load_pickled(path)
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise ArtifactError(
            f"expected a dict of named tensors in {path}, came a {type(loaded).__name__}: "
            "save the adapter again with save_pretrained"
        )
    return {key: value.detach() for key, value in loaded.items()}
