"""Choosing the engine for a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from softprompt.engine.plain import PlainEngine
from softprompt.engine.rows import Engine
from softprompt.errors import ConfigError, nearest

ENGINES = ("auto", "plain")


def build_engine(model: PreTrainedModel, kind: str = "auto") -> Engine:
    """Return the engine ``kind`` names for a model.

    Raises:
        ConfigError: If there is no such engine.
    """
    if kind not in ENGINES:
        raise ConfigError(
            f"engine must be one of {', '.join(ENGINES)}, got {kind!r}{nearest(kind, ENGINES)}"
        )
    return PlainEngine(model)
