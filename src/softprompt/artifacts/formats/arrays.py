"""``npy`` and ``tensor``: files with one bare tensor ``[P, H]``, which do not name their base.

``npy`` is what google-research/prompt-tuning reads and writes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor

from softprompt.artifacts.bare import DECODER, ENCODER, Origin, bare_adapter, check_rows
from softprompt.artifacts.files import read_bytes
from softprompt.artifacts.formats.format import Export, Format, Source, write_output_file
from softprompt.artifacts.formats.part_files import tensor_bytes
from softprompt.artifacts.formats.prefix_store import BARE
from softprompt.artifacts.layout import PROMPT_KEY
from softprompt.artifacts.native import StoredAdapter
from softprompt.artifacts.pickles import damaged, load_pickled
from softprompt.artifacts.plain import bare_rows
from softprompt.backbone import Base, is_encoder_decoder
from softprompt.errors import ArtifactError, ConfigError

_PICKLED = (".pt", ".bin", ".pth")
_SAFE = ".safetensors"


def _lacks_npy(path: Path) -> str | None:
    return None if path.is_file() and path.suffix == ".npy" else "not a .npy file"


def _lacks_tensor(path: Path) -> str | None:
    fits = path.is_file() and path.suffix in (_SAFE, *_PICKLED)
    return None if fits else f"not a {_SAFE}, {' or '.join(_PICKLED)} file"


def _read_npy(source: Source, base: Base | None) -> StoredAdapter:
    path = Path(source)
    data = read_bytes(path)
    try:
        stream = io.BytesIO(data)
        array = np.load(stream, allow_pickle=False)
        rest = len(stream.read())
        if rest:
            raise ValueError(f"{rest:,} bytes follow the array")
        rows = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    # A file that holds objects, or another format under this name, fails in the parser.
    except Exception as error:
        raise damaged(path, len(data), error) from error
    return _adapter(rows, path, base)


def _read_tensor(source: Source, base: Base | None) -> StoredAdapter:
    path = Path(source)
    loaded: Any = _safe(path) if path.suffix == _SAFE else load_pickled(path)
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            names = ", ".join(str(name) for name in list(loaded)[:3]) or "none"
            raise ArtifactError(
                f"expected one tensor [P, H] in {path}, came {len(loaded)} ({names}): save the rows alone"
            )
        (loaded,) = loaded.values()
    return _adapter(loaded, path, base)


def _safe(path: Path) -> dict[str, Tensor]:
    data = read_bytes(path)
    try:
        return tensors_from_bytes(data)
    except Exception as error:
        raise damaged(path, len(data), error) from error


def _adapter(rows: Any, path: Path, base: Base | None) -> StoredAdapter:
    if base is None:
        raise ConfigError(
            f"{path} does not say which base it is for; pass base_model (--base-model)"
        )
    part = ENCODER if is_encoder_decoder(base.model) else DECODER
    checked = check_rows(rows, str(path))
    return bare_adapter({part: checked}, Origin.of_base(base), base, str(path))


def _write_npy(export: Export, path: Path) -> Mapping[str, Any]:
    if path.suffix != ".npy":
        raise ConfigError(f"npy writes a .npy file, came {path.name!r}; end its name in .npy")
    rows = bare_rows(export.plain().input_rows)
    buffer = io.BytesIO()
    # NumPy has no bfloat16; float32 holds it exactly.
    np.save(buffer, (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy())
    write_output_file(path, buffer.getvalue(), overwrite=export.overwrite)
    return {}


def _write_tensor(export: Export, path: Path) -> Mapping[str, Any]:
    rows = bare_rows(export.plain().input_rows)
    if path.suffix == _SAFE:
        data = bytes_from_tensors({PROMPT_KEY: rows}, metadata={"format": "pt"})
    elif path.suffix in _PICKLED:
        data = tensor_bytes(rows)
    else:
        raise ConfigError(
            f"tensor writes a {_SAFE}, {' or '.join(_PICKLED)} file, came {path.name!r}; end its "
            "name in one of these"
        )
    write_output_file(path, data, overwrite=export.overwrite)
    return {}


NPY = Format(
    "npy",
    "a .npy file with one array [P, H]",
    _lacks_npy,
    _read_npy,
    _write_npy,
    reads_with_base=True,
    holds="file",
    loses=BARE,
)
TENSOR = Format(
    "tensor",
    "a .safetensors, .pt, .bin or .pth file with one tensor [P, H]",
    _lacks_tensor,
    _read_tensor,
    _write_tensor,
    reads_with_base=True,
    holds="file",
    loses=BARE,
)
