"""Loading the prompts that a command names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt

_BASE = ("base_model", "torch_dtype", "device", "ignore_fingerprint")


def base_options_of(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that ``base_options`` adds out of ``options``."""
    return {name: options.pop(name) for name in _BASE}


def load_prompts(prompt_dirs: Sequence[str], base: Mapping[str, Any]) -> list[TunedPrompt]:
    """Load prompts of one base as the options of ``base_options`` say."""
    from softprompt.inference import load_many

    return load_many(prompt_dirs, **base)
