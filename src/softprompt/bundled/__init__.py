"""What the package ships, the small base model ``demo`` and the complaint data set, and where a base is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DEMO = "demo"
"""Name of the base model that ships with the package."""

_HERE = Path(__file__).parent


def model_directory() -> Path:
    """Return the folder of the bundled base model."""
    return _HERE / "model"


def source_of(name: str) -> tuple[str, dict[str, str]]:
    """Return where a base is, and what its ``from_pretrained`` takes more: the file of a GGUF model.

    Raises:
        ImportError: If it is a GGUF file, and the package that reads those is not installed.
    """
    if name == DEMO:
        return str(model_directory()), {}
    if not name.endswith(".gguf"):
        return name, {}
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f'reading {name} needs gguf, it is not installed: pip install "softprompt[gguf]"')
    folder, _, file = name.rpartition("/")
    return folder or ".", {"gguf_file": file}


def complaints(split: str) -> Path:
    """Return the JSONL file of a split: ``train``, ``validation`` or ``test``."""
    return _HERE / "complaints" / f"{split}.jsonl"
