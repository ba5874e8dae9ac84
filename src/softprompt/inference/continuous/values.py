"""The values of prompts as requests carry them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from softprompt.attach import places_of, sees_input_of
from softprompt.backbone import Facts
from softprompt.inference.continuous.request import PromptValue, Request
from softprompt.inference.requests import Input
from softprompt.prompts import PromptLearningConfig


def prompt_value(value: Tensor, config: PromptLearningConfig, facts: Facts) -> PromptValue:
    """Return what requests carry of a prompt that materialises to ``value`` on a base."""
    source, decoder = places_of(config, facts).split(value)
    sees_input = sees_input_of(config)
    return PromptValue(content_key(source, decoder, sees_input), source, decoder, sees_input)


def request_of(given: Input, value: PromptValue, **settings: Any) -> Request:
    """Return a request for the answer of a prompt to an input; settings are its other fields."""
    return Request(given.ids, value, given.at, decode=given.decode, **settings)


def content_key(
    value: Tensor | None, decoder: Tensor | None = None, sees_input: bool = True
) -> str:
    """Return a hash of a prompt's content: equal for equal values only."""
    digest = hashlib.sha256(str(sees_input).encode())
    for part in (value, decoder):
        if part is None:
            digest.update(b"none")
            continue
        plain = part.detach().to("cpu").contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
