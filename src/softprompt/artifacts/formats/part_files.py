"""``encoder.pt`` and ``decoder.pt``: one bare tensor ``[P, H]`` each, as caikit and TGIS share them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from softprompt.artifacts.bare import DECODER, ENCODER, check_rows
from softprompt.artifacts.pickles import load_pickled
from softprompt.artifacts.plain import PlainPrompt, bare_rows

PART_NAMES: Mapping[str, str] = {ENCODER: "encoder.pt", DECODER: "decoder.pt"}


def lacks_parts(path: Path) -> str | None:
    """Return what a folder lacks to hold a prompt's parts; None when it holds one."""
    if not path.is_dir():
        return "not a folder"
    if not any((path / name).is_file() for name in PART_NAMES.values()):
        return f"no {' or '.join(PART_NAMES.values())}"
    return None


def read_part(path: Path) -> Tensor:
    """Return the rows in one file.

    Raises:
        ArtifactError: It is damaged, holds code, or is no dense finite tensor ``[P, H]``.
    """
    return check_rows(load_pickled(path), str(path))


def part_bytes(prompt: PlainPrompt) -> dict[str, bytes]:
    """Return the files of a prompt: a causal model's rows are the decoder's."""
    parts = {PART_NAMES[ENCODER]: prompt.encoder, PART_NAMES[DECODER]: prompt.decoder}
    return {name: tensor_bytes(rows) for name, rows in parts.items() if rows is not None}


def tensor_bytes(rows: Tensor) -> bytes:
    """Return what ``torch.save`` writes for a plain tensor."""
    buffer = io.BytesIO()
    torch.save(bare_rows(rows), buffer)
    return buffer.getvalue()
