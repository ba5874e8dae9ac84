"""What the package ships: the small base model ``demo`` and the complaint data set."""

from __future__ import annotations

from pathlib import Path

DEMO = "demo"
"""Name of the base model that ships with the package."""

_HERE = Path(__file__).parent


def model_directory() -> Path:
    """Return the folder of the bundled base model."""
    return _HERE / "model"


def complaints(split: str) -> Path:
    """Return the JSONL file of a split: ``train``, ``validation`` or ``test``."""
    return _HERE / "complaints" / f"{split}.jsonl"
