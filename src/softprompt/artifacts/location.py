"""Where a stored prompt lies: a folder on this machine, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

from softprompt.artifacts.layout import (
    MANIFEST_NAME,
    PICKLED_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from softprompt.errors import ArtifactError
from softprompt.prompts import CONFIG_NAME

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(source: str | Path, subfolder: str | None, revision: str | None) -> Path:
    """Return the folder that holds the adapter's files, fetched first when ``source`` is a hub id.

    A path that exists wins over a hub id; ``HF_HUB_OFFLINE=1`` keeps to what is already here.

    Raises:
        ArtifactError: nothing there, a file instead of a folder, or a subfolder leading outside.
    """
    if subfolder is not None:
        _check_relative(subfolder)
    root = Path(source)
    if not root.exists() and isinstance(source, str) and _HUB_ID.fullmatch(source):
        root = _snapshot(source, subfolder, revision)
    elif not root.exists():
        raise ArtifactError(
            f"expected a prompt directory with {CONFIG_NAME} and {WEIGHTS_NAME}, {source} does "
            "not exist: check the path"
        )
    elif revision is not None:
        raise ArtifactError(
            f"a revision ({revision!r}) selects a version on the hub, {source} is a local path: "
            "leave the revision out"
        )
    directory = root / subfolder if subfolder is not None else root
    if not directory.is_dir():
        came = "is a file" if directory.exists() else "does not exist"
        raise ArtifactError(
            f"expected a prompt directory with {CONFIG_NAME} and {WEIGHTS_NAME}, {directory} "
            f"{came}: pass the folder that holds these files"
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
        f"expected a subfolder inside the prompt directory, came {subfolder!r}, which leads "
        "outside: pass the folder itself as the directory"
    )


def _snapshot(repository: str, subfolder: str | None, revision: str | None) -> Path:
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    names = (CONFIG_NAME, WEIGHTS_NAME, PICKLED_WEIGHTS_NAME, MANIFEST_NAME)
    try:
        path = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[prefix + name for name in names],
        )
    # OSError and ValueError are the roots of what the hub client raises: HTTP, cache, id.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"expected a prompt directory or a repository on the hub, {repository} is neither "
            f"({reason}): check the path, or the name and the connection"
        ) from error
    return Path(path)
