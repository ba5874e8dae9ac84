"""A tuned prompt that was never tuned: its first values, on a base."""

from __future__ import annotations

from typing import Any

import torch

from softprompt.artifacts import Manifest, started_prompt
from softprompt.backbone import Base
from softprompt.engine import completed
from softprompt.inference import TunedPrompt


def untrained(base: Base, config: Any, manifest: Manifest, *, seed: int | None = None) -> Any:
    """Return a prompt of a configuration; with a seed its parameters are normal draws."""
    base.model.requires_grad_(False)
    config = completed(config, base)
    module = started_prompt(config, base.model)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return TunedPrompt(base, module, config, manifest)
