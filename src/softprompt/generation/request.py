"""A generation request: an input, its prompt, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from softprompt.backbone import Base, output_limit
from softprompt.engine import EngineRow, check_context, check_rows
from softprompt.errors import ConfigError, DataError, ServingError
from softprompt.generation.options import Bounds, GenerationOptions
from softprompt.prompts import Prompt

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Input:
    """The tokens before an answer.

    Attributes:
        ids: Token ids of the text.
        at: How many of them stand before the prompt.
        decode: Token ids of an answer to text, as the prompt's answers are written.
        cut: Whether the text was longer than the prompt's limit and was truncated.
    """

    ids: tuple[int, ...]
    at: int
    decode: Decode
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One input and what is wanted of it.

    Attributes:
        ids: Token ids of the input.
        prompt: The prompt; None is the base model alone. A request keeps the one it began with.
        at: Input tokens before the prompt.
        options: How to generate. ``max_time`` counts from submission; with n > 1 answer i samples with
            ``seed + i``.
        n: Answers.
        logprobs: Number of most likely tokens to report with each token's log-probability; None reports neither.
        echo: Whether the input's own log-probabilities are wanted, as an ``EchoEvent``.
        generate: Whether answers are wanted; without them only the input is scored.
        decode: Token ids to text; None is the batcher's own.
    """

    ids: tuple[int, ...]
    prompt: Prompt | None = None
    at: int = 0
    options: GenerationOptions = field(default_factory=GenerationOptions)
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    generate: bool = True
    decode: Decode | None = None

    def __post_init__(self) -> None:
        """Check what needs no model.

        Raises:
            ConfigError: A value is out of range, or neither an answer nor scores are wanted.
            DataError: A token id is negative.
        """
        if self.n < 1:
            raise ConfigError(f"n expects at least 1 answer, got {self.n}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(f"logprobs expects 0 to {MAX_TOP_LOGPROBS} most likely tokens, got {self.logprobs}")
        if min(self.ids, default=0) < 0:
            raise DataError(
                f"token ids are at least 0, got {min(self.ids)}; use the tokenizer that belongs to the model"
            )
        if not self.generate and not self.echo:
            raise ConfigError("the request wants neither an answer nor its input's scores; ask for one")

    @classmethod
    def of(cls, given: Input, prompt: Prompt | None, **settings: Any) -> Request:
        """Return a request for the answer of a prompt to an input; ``settings`` are its other fields."""
        return cls(given.ids, prompt, given.at, decode=given.decode, **settings)

    @property
    def new_tokens(self) -> int:
        """Maximum number of new tokens of one answer."""
        return self.options.max_new_tokens if self.generate else 0

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens of its prompt."""
        return 0 if self.prompt is None else self.prompt.tokens


def check_request(base: Base, request: Request) -> None:
    """Check that the model supports a request, before it is queued.

    Raises:
        ConfigError: The prompt is not one for this model, or an option is not supported.
        DataError: An id is no token of the model, or there is nothing to read.
        ContextOverflowError: Prompt, input and answer do not fit into the context.
    """
    facts, prompt, new = base.facts, request.prompt, request.new_tokens
    if prompt is not None:
        _check_prompt(base, prompt)
    if facts.is_encoder_decoder:
        _check_seq2seq(request)
    check_rows(base, [EngineRow(request.ids, (), prompt, request.at)])
    if not facts.is_encoder_decoder:
        check_context(len(request.ids), request.virtual_tokens, facts.context_length, new=new)
        return
    in_decoder = 0 if prompt is None else prompt.decoder_tokens + prompt.prefix_tokens
    check_context(0, in_decoder, output_limit(base.model), new=new, what="decoder")


def beyond_bounds(request: Request, need: int, bounds: Bounds) -> ServingError:
    """Return the error of a request whose answers of ``need`` tokens each never fit into the bounds."""
    return ServingError(
        f"n = {request.n} of up to {need:,} tokens do not fit into max_batch_rows "
        f"{bounds.max_batch_rows} and max_cached_tokens {bounds.max_cached_tokens:,}; "
        "ask for less or raise the bounds"
    )


def _check_seq2seq(request: Request) -> None:
    for name in ("echo", "preserve_input_text"):
        if getattr(request, name, False) or getattr(request.options, name, False):
            raise ConfigError(
                f"{name} needs a decoder model: the input of an encoder-decoder is no part of its output; "
                "leave it out"
            )


def _check_prompt(base: Base, prompt: Prompt) -> None:
    facts = base.facts
    if prompt.decoder is not None and not facts.is_encoder_decoder:
        raise ConfigError(
            f"the prompt has virtual tokens for a decoder beside an encoder, but {facts.architecture} has one "
            "input; give them as its input"
        )
    for part in (prompt.input, prompt.decoder):
        if part is not None and part.shape[1] != facts.token_dim:
            raise _misfit(base, list(part.shape), f"[P, {facts.token_dim}]")
    if prompt.prefix is not None:
        shape, sizes = base.key_value_shape, list(prompt.prefix.shape)
        if [*sizes[:3], sizes[4]] != [shape.layers, 2, shape.heads, shape.width]:
            raise _misfit(base, sizes, f"[{shape.layers}, 2, {shape.heads}, P, {shape.width}]")
    if not all(bool(torch.isfinite(part).all()) for part in prompt.tensors):
        raise ConfigError("the prompt holds values that are not finite; train or save it again")


def _misfit(base: Base, sizes: list[int], expected: str) -> ConfigError:
    return ConfigError(
        f"the prompt has shape {sizes}, {base.facts.architecture} takes {expected}; use the base it was made for"
    )
