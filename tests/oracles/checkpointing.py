"""Gradient checkpointing by the name that the installed transformers has for it: another one from 5.23 on."""

from __future__ import annotations

from typing import Any


def recompute(model: Any, options: dict[str, Any] | None = None) -> None:
    """Let a model recompute its layers in backward."""
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{named}_checkpointing_enable")(options)


def recomputes(model: Any) -> bool:
    """Tell whether a model recomputes its layers."""
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    found: bool = getattr(model, f"is_{named}_checkpointing")
    return found
