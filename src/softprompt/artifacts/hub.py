"""Sharing prompts on the Hugging Face Hub: a folder put into a repository, repositories and collections fetched.

What is fetched is read, checked and written again by name, so no other file of a repository gets here, and
nothing in one is run.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import get_collection
from safetensors.torch import save as bytes_from_tensors

from softprompt.artifacts.card import hub_name
from softprompt.artifacts.files import read_bytes, require_empty, write_folder
from softprompt.artifacts.layout import (
    CARD_NAME,
    CURVE_NAME,
    MANIFEST_NAME,
    PICKLED_WEIGHTS_NAME,
    WEIGHTS_NAME,
    each_text,
)
from softprompt.artifacts.peft_folder import HUB_ID, PROMPT_FILES, load_adapter, save_adapter, snapshot, upload
from softprompt.errors import ArtifactError, ConfigError, line
from softprompt.prompts import CONFIG_NAME

logger = logging.getLogger(__name__)

_BESIDE = (CARD_NAME, CURVE_NAME, "training_logs.jsonl")
"""What is shared of a prompt's folder besides the prompt."""
_COLLECTION = re.compile(r"(?:https://huggingface\.co/collections/)?([\w.-]+/[\w.-]*[0-9a-f]{24})")


class Publishing(TypedDict, total=False):
    """How a prompt is published.

    Attributes:
        private: Whether a repository that is made is private; None is the owner's default.
        token: Access token; None takes that of ``hf auth login``.
        commit_message: Message of the commit.
        revision: Branch, made if needed; None is the main one.
        create_pr: Open a pull request instead of a commit.
        base_model: Hub id of the base, where the prompt records a folder.
        license: Identifier of the licence, such as ``apache-2.0``, for the card.
        datasets: Hub ids of the data sets that the prompt was trained on, for the card.
    """

    private: bool | None
    token: str | bool | None
    commit_message: str
    revision: str | None
    create_pr: bool
    base_model: str | None
    license: str | None
    datasets: Sequence[str]


def push(directory: str | Path, repo_id: str, **options: Unpack[Publishing]) -> str:
    """Put a prompt's folder into ``org/name`` on the Hub, made if needed, and return the commit's address.

    Raises:
        ArtifactError: The folder is damaged, or the Hub refuses or cannot be reached.
        ConfigError: The base is a folder of this machine, which nobody else has.
    """
    stored, hub = load_adapter(directory), dict[str, Any](options)
    base = hub.pop("base_model", None) or hub_name(stored.base_model or "")
    if base is None:
        raise ConfigError(
            f"the prompt in {stored.location} is for {stored.base_model}, a folder of this machine; name the "
            "base's Hub id, so that others can load it: base_model='org/name' (--base-model)"
        )
    config, manifest = dict(_nameless(stored.config)), stored.manifest
    config |= {name: base for name in ("base_model_name_or_path", "tokenizer_name_or_path") if config.get(name)}
    if manifest is not None:
        manifest = dataclasses.replace(manifest, base_model=base, settings=_nameless(manifest.settings))
    with tempfile.TemporaryDirectory() as folder:
        card = {"repo_id": repo_id} | {name: hub.pop(name) for name in ("license", "datasets") if name in hub}
        save_adapter(Path(folder), config, stored.tensors, manifest, overwrite=True, card=card)
        beside = {name: Path(directory, name) for name in _BESIDE[1:]}
        write_folder(Path(folder), {name: read_bytes(path) for name, path in beside.items() if path.is_file()})
        return upload(Path(folder), repo_id, **hub)


def _nameless(value: Any) -> Any:
    """Return plain values, absolute paths without their folders."""

    def named(text: str) -> str:
        is_path = os.path.isabs(text) and text.count(os.sep) > 1 and "\n" not in text and "{{" not in text
        return os.path.basename(text) if is_path else text

    return each_text(value, named)


def pull(
    repo_id: str,
    directory: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch a prompt from the Hub into a folder, checked as ``load`` checks it, and return the folder.

    Raises:
        ArtifactError: There is no such prompt, it is damaged, or the Hub cannot be reached.
        OutputExistsError: The folder is not empty, and ``overwrite`` is off.
    """
    target = Path(directory)
    require_empty(target, overwrite=overwrite)
    _copy(snapshot(repo_id, [*PROMPT_FILES, *_BESIDE], revision=revision, token=token), target)
    return target


def _copy(found: Path, target: Path) -> None:
    """Copy a prompt by the names of its files, weights always as safetensors."""
    stored = load_adapter(found)
    names = [
        name for name in (*PROMPT_FILES, *_BESIDE) if name != PICKLED_WEIGHTS_NAME and (found / name).is_file()
    ]
    files = {name: read_bytes(found / name) for name in names}
    if WEIGHTS_NAME not in files:
        files[WEIGHTS_NAME] = bytes_from_tensors(stored.tensors, metadata={"format": "pt"})
        files.pop(MANIFEST_NAME, None)  # it has the hash of the pickled ones
    write_folder(target, files, stale=(PICKLED_WEIGHTS_NAME, WEIGHTS_NAME, MANIFEST_NAME))


@contextmanager
def local_prompts(source: str | Path) -> Iterator[Path]:
    """Yield a folder with a folder for each prompt; those of the Hub are fetched, and removed again at the end.

    Args:
        source: A folder; or a collection, or a repository with one prompt or several, ``org/name``.

    Raises:
        ArtifactError: There is no such folder, and no prompt could be had from the Hub.
    """
    name = str(source)
    collection = _COLLECTION.fullmatch(name)
    # What lies beside other files here is a mistyped folder.
    if Path(source).exists() or not (collection or HUB_ID.fullmatch(name)) or Path(source).parent.exists():
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="softprompt-") as root:
        found = _collected(collection[1]) if collection else _of_repository(name)
        for prompt, folder in found.items():
            try:
                _copy(folder, Path(root, prompt))
            except ArtifactError as error:
                logger.warning("%s of %s is left out: %s", line(prompt), line(name), error)
        if not os.listdir(root):
            raise ArtifactError(
                f"expected prompts in {name}, it has none; name a folder, a collection or a repository"
            )
        yield Path(root)


def _of_repository(name: str) -> dict[str, Path]:
    """Return the folders of a repository's prompts: itself, or the folders in it."""
    root = snapshot(name, [*PROMPT_FILES, *(f"*/{file}" for file in PROMPT_FILES)])
    if (root / CONFIG_NAME).is_file():
        return {name.partition("/")[2]: root}
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG_NAME}"))}


def _collected(slug: str) -> dict[str, Path]:
    """Return the folders of a collection's prompts, two of one name by their whole names."""
    try:
        repositories = [item.item_id for item in get_collection(slug).items if item.item_type == "model"]
    # The hub client raises errors of its HTTP library, which share no root with its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"the collection {slug} cannot be had from the Hub ({reason}); check its name and the connection"
        ) from error
    found: dict[str, Path] = {}
    for name in repositories:
        own = name.partition("/")[2]
        short = name.replace("/", "--") if own in found else own
        try:
            found[short] = snapshot(name, PROMPT_FILES)
        except ArtifactError as error:
            logger.warning("%s of the collection is left out: %s", line(name), error)
    return found
