"""The one artifact: PEFT's prompt-tuning folder, written whole or not at all, checked when read.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's and load in PEFT unchanged;
``softprompt.json`` and ``README.md`` are beside them. A folder may be read from a repository of the
Hugging Face Hub, and uploaded to one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor

from softprompt.artifacts.card import is_own_card, model_card
from softprompt.artifacts.files import (
    MOST_TEXT_BYTES,
    load_safetensors,
    parse_object,
    read_bytes,
    require_empty,
    say_if_large,
    write_folder,
)
from softprompt.artifacts.layout import (
    CARD_NAME,
    MANIFEST_NAME,
    PICKLED_WEIGHTS_NAME,
    WEIGHTS_NAME,
    check_config,
    check_tensors,
    config_json,
    portable,
)
from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.pickled import load_pickled, pickled_bytes
from softprompt.artifacts.stored_prompt import StoredPrompt
from softprompt.errors import ArtifactError, no_folder
from softprompt.prompts import CONFIG_NAME
from softprompt.untrusted import check_base_name

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Characters of a part of a path, which no file system exceeds."""
PROMPT_FILES = (CONFIG_NAME, WEIGHTS_NAME, PICKLED_WEIGHTS_NAME, MANIFEST_NAME)


def save_adapter(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    manifest: Manifest | None = None,
    *,
    overwrite: bool,
    pickled: bool = False,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write PEFT's folder, plus manifest and model card, all of it or nothing.

    Args:
        directory: new or empty, unless ``overwrite``; unrelated files in it stay.
        config: PEFT's keys and plain values, as ``PromptTuningConfig.to_dict()`` gives them.
        tensors: ``prompt_embeddings`` and heads under PEFT's names.
        manifest: the content of ``softprompt.json``; None writes none.
        overwrite: replace the prompt that ``directory`` holds; a README.md that softprompt did
            not write is left as it is.
        pickled: write the weights as ``adapter_model.bin``, for readers without safetensors.
        card: what the card of a published prompt says besides, as keywords of ``model_card``.

    Raises:
        OutputExistsError: the directory is not empty, or is a file.
        ArtifactError: values that could not be read back, or the file system failed.
    """
    directory = Path(directory)
    require_empty(directory, overwrite=overwrite)
    config = portable(config, directory)
    if manifest is not None:
        plain = {name: portable(getattr(manifest, name), directory) for name in ("base_model", "settings", "data")}
        manifest = dataclasses.replace(manifest, **plain)
    files = _files_of(config, tensors, manifest, pickled=pickled)
    there = directory / CARD_NAME
    # save_pretrained(".") in a project must not cost the user the project's own README.
    if not there.is_file() or is_own_card(read_bytes(there).decode(errors="replace")):
        files[CARD_NAME] = model_card(config, manifest, **card or {}).encode()
    try:
        write_folder(directory, files, stale=(PICKLED_WEIGHTS_NAME, WEIGHTS_NAME, MANIFEST_NAME))
    except OSError as error:
        raise ArtifactError(
            f"could not write the prompt to {directory} ({error}); nothing there was changed: "
            "free some space or choose another directory"
        ) from error
    say_if_large(len(files[PICKLED_WEIGHTS_NAME if pickled else WEIGHTS_NAME]))


def _files_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], manifest: Manifest | None, *, pickled: bool
) -> dict[str, bytes]:
    """Return the content of the files that loading needs, checked as loading checks it."""
    config_text = config_json(config)
    check_config(config)
    check_tensors(config, tensors, "the tensors to save")
    # clone(): safetensors refuses tensors that share storage, as tied heads do.
    dense = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    weights = pickled_bytes(dense) if pickled else bytes_from_tensors(dense, metadata={"format": "pt"})
    files = {PICKLED_WEIGHTS_NAME if pickled else WEIGHTS_NAME: weights, CONFIG_NAME: config_text.encode()}
    if manifest is not None:
        digest = hashlib.sha256(weights).hexdigest()
        hashed = dataclasses.replace(manifest, weights_sha256=digest)
        files[MANIFEST_NAME] = hashed.to_json().encode()
    return files


def load_adapter(
    directory_or_hub_id: str | Path, *, subfolder: str | None = None, revision: str | None = None, **hub: Any
) -> StoredPrompt:
    """Read and check a prompt that softprompt or PEFT wrote.

    Args:
        directory_or_hub_id: a folder, or ``org/name`` on the Hugging Face Hub.
        subfolder: a named adapter's folder inside it.
        revision: a branch, tag or commit, for hub ids only.
        **hub: other options of a download from there, such as ``token`` and ``cache_dir``.

    Raises:
        ArtifactError: missing, damaged, or not a prompt-learning adapter; the message says which.
    """
    directory = locate(directory_or_hub_id, subfolder, revision, **hub)
    if not (directory / CONFIG_NAME).is_file():
        raise ArtifactError(
            f"expected {CONFIG_NAME} in {directory}, it has none: pass the folder that "
            "save_pretrained or `softprompt tune` wrote"
        )
    names = (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME)
    found = {name: directory / name for name in names if (directory / name).is_file()}
    most = {WEIGHTS_NAME: None}
    files = {name: read_bytes(path, most.get(name, MOST_TEXT_BYTES)) for name, path in found.items()}
    return _parsed(files, directory, str(directory))


def adapter_of_files(files: Mapping[str, bytes], name: str) -> StoredPrompt:
    """Parse and check a prompt whose files are in memory; pickled weights are not supported.

    Args:
        files: the content of ``adapter_config.json``, ``adapter_model.safetensors`` and, where
            there is one, ``softprompt.json``.
        name: what errors call the folder.

    Raises:
        ArtifactError: a file is missing, damaged, or not a prompt-learning adapter's.
    """
    for needed in (CONFIG_NAME, WEIGHTS_NAME):
        if needed not in files:
            raise ArtifactError(f"expected {needed} in {name}, it has none: copy it there")
    return _parsed(files, Path(name), name)


def _parsed(files: Mapping[str, bytes], directory: Path, location: str) -> StoredPrompt:
    """Parse and check a prompt's files; pickled weights are read from the folder."""
    name = str(directory / CONFIG_NAME)
    config = parse_object(files[CONFIG_NAME].decode(errors="replace"), name)
    check_config(config)
    base = "base_model_name_or_path"
    config |= {base: check_base_name(config[base], str(directory / CONFIG_NAME))} if base in config else {}
    record, weights = files.get(MANIFEST_NAME), files.get(WEIGHTS_NAME)
    manifest = None if record is None else _manifest_of(record, directory / MANIFEST_NAME)
    path = directory / (PICKLED_WEIGHTS_NAME if weights is None else WEIGHTS_NAME)
    tensors = _unpickled(path) if weights is None else load_safetensors(weights, path)
    if manifest is not None:
        _check_digest(path, read_bytes(path) if weights is None else weights, manifest)
    check_tensors(config, tensors, str(path))
    return StoredPrompt(config, tensors, manifest, location)


def _manifest_of(data: bytes, path: Path) -> Manifest:
    try:
        manifest = Manifest.from_dict(parse_object(data.decode(errors="replace"), path.name))
        return dataclasses.replace(manifest, base_model=check_base_name(manifest.base_model, str(path)))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _check_digest(path: Path, data: bytes, manifest: Manifest) -> None:
    expected = manifest.weights_sha256
    found = hashlib.sha256(data).hexdigest()
    if expected is not None and found != expected:
        raise ArtifactError(
            f"expected {path} with sha256 {expected[:12]}… ({MANIFEST_NAME}), got {found[:12]}…: "
            f"restore the weights, or delete {MANIFEST_NAME} if they were replaced on purpose"
        )


def _unpickled(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtifactError(
            f"expected {WEIGHTS_NAME} (or {PICKLED_WEIGHTS_NAME}) in {path.parent}, it has neither: "
            "copy the weights beside adapter_config.json"
        )
    loaded = load_pickled(path)
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise ArtifactError(
            f"expected a dict of named tensors in {path}, got a {type(loaded).__name__}: "
            "save the adapter again with save_pretrained"
        )
    return {key: value.detach() for key, value in loaded.items()}


def locate(source: str | Path, subfolder: str | None, revision: str | None, **hub: Any) -> Path:
    """Return the folder that holds the adapter's files, downloaded first when ``source`` is a hub id.

    A path that exists wins over a hub id; ``HF_HUB_OFFLINE=1`` uses the local cache alone.

    Raises:
        ArtifactError: missing, a file instead of a folder, or a subfolder leading outside.
    """
    if subfolder is not None:
        _check_relative(subfolder)
    root = Path(source)
    if not root.exists():
        asks_hub = isinstance(source, str) and HUB_ID.fullmatch(source) is not None
        if revision is None and (misspelt := no_folder(source, before_hub=asks_hub)):
            raise ArtifactError(f"expected a prompt directory with {CONFIG_NAME} and {WEIGHTS_NAME}: {misspelt}")
        if not asks_hub:
            raise ArtifactError(
                f"expected a prompt directory with {CONFIG_NAME} and {WEIGHTS_NAME}, {source} does "
                "not exist: check the path"
            )
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        root = snapshot(str(source), [prefix + name for name in PROMPT_FILES], revision=revision, **hub)
    elif revision is not None:
        raise ArtifactError(
            f"a revision ({revision!r}) selects a version on the hub, {source} is a local path: "
            "leave the revision out"
        )
    directory = root / subfolder if subfolder is not None else root
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise ArtifactError(
            f"expected a prompt directory with {CONFIG_NAME} and {WEIGHTS_NAME}, {directory} "
            f"{problem}: pass the folder that holds these files"
        )
    if not directory.resolve().is_relative_to(root.resolve()):
        raise _outside(subfolder or "")
    return directory


def _check_relative(subfolder: str) -> None:
    path = PurePosixPath(subfolder.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in subfolder:
        raise _outside(subfolder)


def _outside(subfolder: str) -> ArtifactError:
    return ArtifactError(
        f"expected a subfolder inside the prompt directory, got {subfolder!r}, which leads "
        "outside: pass the folder itself as the directory"
    )


def snapshot(repository: str, patterns: Sequence[str], **hub: Any) -> Path:
    """Return a repository's folder in the local cache, its files of these patterns fetched where they can be.

    Raises:
        ArtifactError: there is no such repository, or it is neither in reach nor in the cache.
    """
    try:
        path = snapshot_download(repository, allow_patterns=list(patterns), **hub)
    # OSError and ValueError are the roots of what the hub client raises: HTTP, cache, id.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        if isinstance(error, LocalEntryNotFoundError):
            reason = "the Hub cannot be reached, and it is not in the local cache"
        misspelt = no_folder(repository) or f"{repository} is neither"
        raise ArtifactError(
            f"expected a prompt directory or a repository on the hub, {misspelt} "
            f"({reason}): check the path, or the name and the connection"
        ) from error
    return Path(path)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put the files of a folder into a repository, made if needed, and return the commit's address.

    Raises:
        ArtifactError: If the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message or "Upload soft prompt",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    # The hub client raises errors of its HTTP library, which share no root with its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"could not upload to {repo_id} ({reason}); check the name, the connection and `hf auth login`"
        ) from error
    return str(commit.commit_url)
