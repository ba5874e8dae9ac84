"""``tgis``: a prompt in the prefix store of IBM's text-generation-inference.

``PREFIX_STORE/<id>/`` holds ``encoder.pt`` and ``decoder.pt``; the folder's name is the id that
requests give. The store also takes a PEFT folder, which is the format ``peft``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.artifacts.bare import Origin, bare_adapter
from softprompt.artifacts.files import require_empty, require_no_file, write_folder
from softprompt.artifacts.formats.format import (
    MEASURED,
    USED,
    Export,
    Format,
    Source,
    write_failed,
)
from softprompt.artifacts.formats.part_files import (
    PART_NAMES,
    lacks_parts,
    part_bytes,
    read_part,
)
from softprompt.artifacts.native import StoredAdapter
from softprompt.backbone import Base
from softprompt.errors import ArtifactError, ConfigError

BARE = ("template", "base_model", *USED, *MEASURED, "base_fingerprint", "dtype")
"""What rows by themselves do not say."""

_PREFIX_ID = re.compile(r"[\w-]+")


def _read(source: Source, base: Base | None) -> StoredAdapter:
    path = Path(source)
    if base is None:
        raise ConfigError(
            f"{path} does not say which base it is for; pass base_model (--base-model)"
        )
    found = {part: path / name for part, name in PART_NAMES.items() if (path / name).is_file()}
    parts = {part: read_part(file) for part, file in found.items()}
    return bare_adapter(parts, Origin.of_base(base), base, str(path))


def _write(export: Export, path: Path) -> Mapping[str, Any]:
    prompt = export.plain()
    if not _PREFIX_ID.fullmatch(path.name):
        raise ConfigError(
            f"the folder's name is the prefix id, which TGIS makes of letters, digits, _ and -; "
            f"came {path.name!r}, rename it"
        )
    length = len(prompt.encoder if prompt.decoder is None else prompt.decoder)  # type: ignore[arg-type]
    if prompt.seq2seq and length % 2:
        raise ArtifactError(
            f"TGIS takes an even number of virtual tokens for seq2seq models, this prompt has "
            f"{length}; train one of {length + 1}"
        )
    write_parts(path, part_bytes(prompt), overwrite=export.overwrite)
    return {"prefix_id": path.name}


def write_parts(path: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write a folder of parts, taking away those that the prompt does not have.

    Raises:
        OutputExistsError: The folder is not empty, and may not be overwritten.
        ArtifactError: The file system refused.
    """
    require_no_file(path) if overwrite else require_empty(path)
    try:
        write_folder(path, files, stale=PART_NAMES.values())
    except OSError as error:
        raise write_failed(path, error) from error


TGIS = Format(
    "tgis",
    "a folder PREFIX_STORE/<id> with encoder.pt, decoder.pt or both",
    lacks_parts,
    _read,
    _write,
    reads_with_base=True,
    loses=BARE,
)
