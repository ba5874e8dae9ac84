"""What a prompt is to a model: one immutable value, from whatever is trained to the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from softprompt.errors import ConfigError
from softprompt.prompts.kinds import Placement


@dataclass(frozen=True, eq=False)
class Prompt:
    """The virtual tokens of one prompt by where they stand; two prompts are equal if they are one object.

    Attributes:
        input: Virtual tokens in the (encoder's) input ``[P, H]``; None where there are none.
        decoder: Virtual tokens before the decoder's input of a seq2seq model ``[P, H]``, or None.
        prefix: Keys and values of the decoder's layers ``[L, 2, A_kv, P, D]``, or None.
        placement: Where ``input`` stands among the input's tokens.
        sees_input: Whether an encoder's virtual tokens attend to the input.
        places: Positions of the prefix's virtual tokens and, last, of the token behind them; None is 0 to P.

    Raises:
        ConfigError: If a part has another rank, or a prefix stands beside other parts.
    """

    input: Tensor | None = None
    decoder: Tensor | None = None
    prefix: Tensor | None = None
    placement: Placement = Placement.PREFIX
    sees_input: bool = True
    places: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, rank, shape in (("input", 2, "[P, H]"), ("decoder", 2, "[P, H]")):
            part: Tensor | None = getattr(self, name)
            if part is not None and part.dim() != rank:
                raise ConfigError(f"{name} of a prompt must be {shape}, got {list(part.shape)}")
        if self.prefix is None:
            return
        if self.prefix.dim() != 5:
            raise ConfigError(f"prefix of a prompt must be [L, 2, A_kv, P, D], got {list(self.prefix.shape)}")
        if self.input is not None or self.decoder is not None:
            raise ConfigError("a prompt is a prefix or virtual tokens, not both; split it in two")

    @property
    def input_tokens(self) -> int:
        """Virtual tokens in the (encoder's) input."""
        return 0 if self.input is None else int(self.input.shape[0])

    @property
    def decoder_tokens(self) -> int:
        """Virtual tokens before the decoder's input of a seq2seq model."""
        return 0 if self.decoder is None else int(self.decoder.shape[0])

    @property
    def prefix_tokens(self) -> int:
        """Virtual tokens whose keys and values stand before those of the (decoder's) tokens."""
        return 0 if self.prefix is None else int(self.prefix.shape[3])

    @property
    def prefix_places(self) -> tuple[int, ...]:
        """Positions of the prefix's virtual tokens and, last, of the token behind them."""
        return self.places or tuple(range(self.prefix_tokens + 1))

    @property
    def tokens(self) -> int:
        """Virtual tokens in all parts."""
        return self.input_tokens + self.decoder_tokens + self.prefix_tokens

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parts that are there: input, decoder, prefix."""
        return tuple(part for part in (self.input, self.decoder, self.prefix) if part is not None)

    @property
    def by_token(self) -> Tensor:
        """The values of each virtual token, ``[P, X]``: X is H, or L·2·A_kv·D for keys and values."""
        return torch.cat([part if part.dim() == 2 else part.movedim(3, 0).flatten(1) for part in self.tensors])

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a prompt whose parts are changed one by one."""
        parts: dict[str, Any] = {
            name: change(part)
            for name in ("input", "decoder", "prefix")
            if (part := getattr(self, name)) is not None
        }
        return replace(self, **parts)

    def without(self, hidden: Collection[int]) -> Self:
        """Return a prefix without some of its virtual tokens; the others, and the text, stay at their positions."""
        if self.prefix is None or not hidden:
            return self
        kept = [i for i in range(self.prefix_tokens) if i not in hidden]
        index, places = torch.tensor(kept, device=self.prefix.device), self.prefix_places
        left = self.prefix.index_select(3, index)
        return replace(self, prefix=left, places=(*(places[i] for i in kept), places[-1]))

    def detach(self) -> Self:
        """Return the prompt without its graph; its memory is shared."""
        return self.map(torch.Tensor.detach)

    def leaves(self) -> Self:
        """Return the prompt as new leaves that take a gradient; their memory is shared."""
        return self.map(lambda part: part.detach().requires_grad_())

    def to(self, device: torch.device) -> Self:
        """Return the prompt on a device; itself when it is there already."""
        if all(part.device == device for part in self.tensors):
            return self
        return self.map(lambda part: part.to(device))

    @cached_property
    def key(self) -> str:
        """A hash of the content: equal keys are equal values, wherever they stand in the input."""
        digest = hashlib.sha256(f"{self.sees_input} {self.places or ''}".strip().encode())
        for part in (self.input, self.decoder, self.prefix):
            if part is None:
                digest.update(b"none")
                continue
            plain = part.detach().to("cpu").contiguous()
            digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        return digest.hexdigest()
