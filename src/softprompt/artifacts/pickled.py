"""Files of ``torch.save``: code in them never runs, and nothing they ask for is larger than a file may be."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy
import torch
from torch import Tensor

from softprompt.artifacts.files import damaged
from softprompt.errors import ArtifactError
from softprompt.untrusted import most_weight_bytes, read_bytes

_ZIP = b"PK\x03\x04"
_MOST_STEPS = 100_000
"""Instructions of a pickle, which has about thirty for each tensor."""
_DICT, _EMPTY = "collections OrderedDict", "()"
_NEEDED = re.compile(
    rf"{_DICT}|torch [A-Z]\w*Storage|torch\._utils _rebuild_(?:tensor(?:_v2)?|parameter(?:_with_state)?)"
)
"""What torch writes of dense tensors. It also lets a pickle make bytearrays of any size, and encode texts."""
_SHARED = {"GLOBAL": "name", "BINUNICODE": "text", "SHORT_BINSTRING": "text", "REDUCE": "tensor"}
"""Instructions whose results may be taken out of the memo: these are neither copied nor hashed at length."""


def load_pickled(path: Path) -> Any:
    """Return what a file of ``torch.save`` holds without running code: tensors in plain containers.

    Raises:
        ArtifactError: it is damaged, or holds code, which is never run.
    """
    data = read_bytes(path)
    try:
        checked, sizes = _checked(data)
        loaded = torch.load(io.BytesIO(checked), map_location="cpu" if sizes else _fixed, weights_only=True)
        _check_storages(loaded, sizes)
        return loaded
    except UnpicklingError as error:
        raise ArtifactError(
            f"expected plain dense tensors only in {path}, it is damaged or holds code, which is never run: "
            "save it again as .safetensors from a source you trust"
        ) from error
    # A damaged stream can fail anywhere in the unpickler, IndexError and AttributeError included.
    except Exception as error:
        raise damaged(path, len(data), error) from error


def _checked(data: bytes) -> tuple[bytes, Collection[int]]:
    """Return what ``torch.load`` may unpack, and the sizes of its records; none in the old form, which has none.

    An archive is written anew, so that torch, which finds its index and names otherwise, sees what was checked.

    Raises:
        ValueError: records are packed or have one name, or a program is refused.
    """
    if not data.startswith(_ZIP):  # as torch tells the forms apart
        stream = io.BytesIO(data)
        for _ in range(5):  # which the old form has
            if stream.tell() < len(data):
                _check_program(stream)
        return data, []
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(kept := io.BytesIO(), "w") as anew:
        found = archive.infolist()
        sizes = [each.file_size for each in found]
        if any(each.compress_type for each in found) or sum(sizes) > len(data):
            raise ValueError("its records are packed")
        if len({each.filename.lower() for each in found}) < len(found):
            raise ValueError("two of its records have one name")
        for each in found:
            record = archive.read(each)
            if each.filename.lower().endswith(".pkl"):
                _check_program(io.BytesIO(record))
            anew.writestr(each.filename, record)
    return kept.getvalue(), sizes


def _check_program(stream: IO[bytes]) -> None:
    """Check the next pickle of a stream, of which each instruction then makes no more than it has bytes.

    Raises:
        ValueError: it is long, or copies or hashes what is shared: a dict, or tuples in tuples again and again.
        UnpicklingError: it names what no tensor needs.
    """
    top, memo = "", dict[Any, str]()
    for steps, (code, argument, at) in enumerate(pickletools.genops(stream)):
        name, before = code.name, top
        if name == "GLOBAL" and not _NEEDED.fullmatch(str(argument)):
            raise UnpicklingError(f"{argument} at byte {at:,}")
        top = _SHARED.get(name, "")
        if name.endswith("PUT") and before != _EMPTY:
            top = memo[argument] = before
        elif before == _DICT:  # it is made empty, never of another
            top = _EMPTY if name == "EMPTY_TUPLE" else "copy"
        elif before == _EMPTY:
            top = "" if name == "REDUCE" else "copy"
        elif name == "GLOBAL":
            top = str(argument)
        elif name.endswith("GET"):
            top = memo.get(argument) or "copy"
        if steps > _MOST_STEPS or top == "copy":
            raise ValueError(f"its program is too long, or copies what it shares, at byte {at:,}")


def _fixed(storage: Any, _location: str) -> Any:
    """Return zeros in the place of a storage of the old form, which no tensor over them makes larger."""
    return torch.from_numpy(numpy.zeros(storage.nbytes(), "u1")).untyped_storage()


def _check_storages(loaded: Any, sizes: Collection[int]) -> None:
    """Check that tensors have the values that they say they have, and are no larger than a file may be.

    Raises:
        ValueError: a storage is longer than its record, or a small one is expanded to many values.
    """
    held = [
        each for each in (loaded.values() if isinstance(loaded, dict) else [loaded]) if isinstance(each, Tensor)
    ]
    if sum(each.numel() * each.element_size() for each in held) > most_weight_bytes():
        raise ValueError("its tensors are larger than the file")
    if sizes and any(each.untyped_storage().nbytes() not in sizes for each in held):
        raise ValueError("a tensor is longer than its record")


def pickled_bytes(value: Tensor | dict[str, Tensor]) -> bytes:
    """Return what ``torch.save`` writes of tensors, which ``load_pickled`` reads without running code."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
