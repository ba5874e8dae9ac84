"""The prompts of saved or trained artifacts as values that requests carry."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt.attach.completion import sees_input_of
from softprompt.attach.heads import heads_of
from softprompt.data.tokens import RowTokenizer
from softprompt.errors import ConfigError
from softprompt.inference.continuous.request import PromptValue, Request

if TYPE_CHECKING:
    from softprompt.inference.tuned import TunedPrompt


def prompt_value(tuned: TunedPrompt) -> PromptValue:
    """Return the value that a prompt has now, baked, for the task it is used for.

    Raises:
        ConfigError: The prompt has several tasks and none is chosen, or a head of its own beside its rows.
    """
    head = next((path for path, _ in heads_of(tuned.model.get_base_model(), tuned.adapter)), None)
    if head is not None:
        raise ConfigError(
            f"prompt {tuned.adapter!r} has its own {head}, and only the base's is served; use generate"
        )
    places, parts = tuned.places, tuned.prompts()
    value = parts[places.source_index(0)].clone() if places.source else None
    decoder = parts[places.decoder_index(0)].clone() if places.decoder else None
    sees_input = sees_input_of(tuned.model.peft_config[tuned.adapter])
    return PromptValue(content_key(value, decoder, sees_input), value, decoder, sees_input)


def request_of(
    rows: RowTokenizer, value: PromptValue, ids: Sequence[int], **settings: Any
) -> Request:
    """Return a request for the answer of a prompt that reads ``rows``; settings are its other fields."""
    at = rows.offset(ids) if value.value is not None else 0
    return Request(tuple(ids), value, at, decode=rows.decode, **settings)


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
