"""PROMPT <-> DISK: PEFT's folder, plus ``softprompt.json`` for what PEFT has no place for."""

from __future__ import annotations

from softprompt.artifacts.card import model_card
from softprompt.artifacts.files import require_empty, write_atomically
from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter, load_adapter, save_adapter

__all__ = [
    "Manifest",
    "StoredAdapter",
    "load_adapter",
    "model_card",
    "require_empty",
    "save_adapter",
    "write_atomically",
]
