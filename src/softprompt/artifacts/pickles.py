"""Tensors from files of ``torch.save``, read so that no code in them can run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from softprompt.artifacts.files import read_bytes
from softprompt.errors import ArtifactError


def load_pickled(path: Path) -> Any:
    """Return what a file of ``torch.save`` holds: tensors and plain containers of them.

    Raises:
        ArtifactError: it is damaged, or holds code, which is never run.
    """
    data = read_bytes(path)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"expected tensors only in {path}, it is damaged or holds code, which is never run: "
            "save it again as .safetensors from a source you trust"
        ) from error
    # A damaged stream can fail anywhere in the unpickler, IndexError and AttributeError included.
    except Exception as error:
        raise damaged(path, len(data), error) from error


def damaged(path: Path, size: int, error: Exception) -> ArtifactError:
    """Return the error for weights that cannot be parsed; ``size`` in bytes."""
    reason = " ".join(str(error).split())[:120]
    return ArtifactError(
        f"expected whole weights in {path}, the file is truncated or damaged ({size:,} bytes; "
        f"{reason}): copy it again from the original"
    )
