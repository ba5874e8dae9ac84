"""Answers in OpenAI's shapes, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from softprompt.inference import EchoEvent, Event, FinishEvent, TokenEvent, TopLogProbs
from softprompt.server.asked import Asked
from softprompt.server.token_bytes import bytes_of

_LONGEST = 4
"""Bytes of a character at most."""


class Usage(BaseModel):
    """Tokens of a call; the prompt's virtual ones are counted apart from the input's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    virtual_tokens: int


class TokenLogprobs(BaseModel):
    """What a completion says of its tokens, in nats."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer; ``seed`` draws it again, where it was drawn."""

    index: int
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: str
    seed: int | None


class Completion(BaseModel):
    """The answer of ``POST /v1/completions``."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatChoice(BaseModel):
    """One answer of a chat."""

    index: int
    message: dict[str, str]
    logprobs: dict[str, Any] | None
    finish_reason: str
    seed: int | None


class ChatCompletion(BaseModel):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TokenTexts:
    """What single tokens are called."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """Return a token's text; a part of a character has no text and is shown as in the vocabulary."""
        if token_id not in self._known:
            self._known[token_id] = self._text(token_id)
        return self._known[token_id]

    def likeliest(self, own: int, logprob: float | None, top: TopLogProbs) -> dict[str, float]:
        """Return the likeliest tokens with the one that came; of tokens that read alike the likelier."""
        found: dict[str, float] = {}
        for token, value in top:
            found.setdefault(self(token), value)
        if logprob is not None:
            found.setdefault(self(own), logprob)
        return found

    def bytes(self, token_id: int) -> list[int] | None:
        """Return a token's bytes; None where they cannot be told."""
        symbol, text = self._symbol(token_id), self.decoded([token_id])
        found = bytes_of(symbol, text if "\ufffd" in text else self(token_id))
        return None if found is None else list(found)

    def decoded(self, ids: Sequence[int]) -> str:
        """Return the text of tokens together."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def is_special(self, token_id: int) -> bool:
        """Tell whether a token is left out of texts."""
        return token_id in self._special

    def _symbol(self, token_id: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def _text(self, token_id: int) -> str:
        token = self._symbol(token_id)
        if token.startswith("\u2581"):  # sentencepiece drops the space of what stands alone
            return token.replace("\u2581", " ")
        text = self.decoded([token_id])
        return token if "\ufffd" in text or not text else text


@dataclass(slots=True)
class Position:
    """Where the next token's text begins.

    Attributes:
        at: Characters before it.
        parts: Tokens of a character that is not whole yet.
    """

    at: int = 0
    parts: list[int] = field(default_factory=list)

    def take(self, texts: TokenTexts, token_id: int) -> int:
        """Go past a token, and return where its text begins."""
        begin = self.at
        if texts.is_special(token_id):
            return begin
        self.parts.append(token_id)
        text = texts.decoded(self.parts)
        if not text.endswith("\ufffd"):
            self.at += len(text if len(self.parts) > 1 else texts(token_id))
            self.parts.clear()
        elif len(self.parts) == _LONGEST:  # bytes that never become a character
            self.at += len(text)
            self.parts.clear()
        return begin


@dataclass(slots=True)
class Scores:
    """Log-probabilities of tokens in a row."""

    ids: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    top: list[TopLogProbs] = field(default_factory=list)

    def take(self, event: TokenEvent | EchoEvent) -> None:
        """Add what an event tells."""
        if isinstance(event, TokenEvent):
            self.ids.append(event.token_id)
            self.values.append(event.logprob)
            self.top.append(event.top_logprobs)
            return
        self.ids += event.token_ids
        self.values += event.logprobs
        self.top += event.top_logprobs

    def completion(self, texts: TokenTexts, position: Position, *, top: bool) -> dict[str, Any]:
        """Return them as completions have them; ``position`` goes past them."""
        names = [texts(token) for token in self.ids]
        offsets = [position.take(texts, token) for token in self.ids]
        rows = zip(self.ids, self.values, self.top, strict=True)
        likeliest = [None if v is None else texts.likeliest(i, v, t) for i, v, t in rows]
        return {
            "tokens": names,
            "token_logprobs": list(self.values),
            "top_logprobs": likeliest if top else None,
            "text_offset": offsets,
        }

    def chat(self, texts: TokenTexts) -> dict[str, Any]:
        """Return them as chats have them."""
        rows = zip(self.ids, self.values, self.top, strict=True)
        return {
            "content": [
                {
                    **_named(texts, token, value),
                    "top_logprobs": [_named(texts, i, v) for i, v in top],
                }
                for token, value, top in rows
            ],
            "refusal": None,
        }


def _named(texts: TokenTexts, token: int, value: float | None) -> dict[str, Any]:
    return {"token": texts(token), "logprob": value, "bytes": texts.bytes(token)}


@dataclass(slots=True)
class Choice:
    """One answer while it is gathered."""

    index: int
    text: str = ""
    scores: Scores = field(default_factory=Scores)
    reason: str = "length"
    tokens: int = 0
    seed: int | None = None


@dataclass(slots=True)
class Reply:
    """All answers of a call, gathered from events."""

    asked: Asked
    kind: str
    head: dict[str, Any]
    choices: list[Choice]

    @classmethod
    def of(cls, asked: Asked, prefix: str, kind: str) -> Reply:
        """Begin with nothing."""
        head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.served.name,
            # Which version of the prompt's files answered.
            "system_fingerprint": f"sp-{asked.served.version[:16]}",
        }
        count = sum(request.n for request in asked.requests)
        return cls(asked, kind, head, [Choice(index) for index in range(count)])

    def choices_of(self, number: int, event: Event) -> Sequence[Choice]:
        """Return the answers that an event of input ``number`` is about."""
        n = self.asked.requests[number].n
        if isinstance(event, EchoEvent):
            return self.choices[number * n : number * n + n]
        return [self.choices[number * n + event.index]]

    def take(self, number: int, event: Event) -> None:
        """Add what an event tells."""
        for choice in self.choices_of(number, event):
            match event:
                case EchoEvent():
                    choice.scores.take(event)
                case TokenEvent():
                    choice.text += event.text
                    choice.scores.take(event)
                case FinishEvent():
                    choice.reason = event.reason
                    choice.tokens = len(event.tokens)
                    choice.seed = event.seed

    def usage(self) -> dict[str, int]:
        """Return the tokens of the call."""
        inputs = sum(len(each.ids) for each in self.asked.inputs)
        new = sum(choice.tokens for choice in self.choices)
        prompt = self.asked.served.prompt
        virtual = 0 if prompt is None else prompt.tokens * len(self.asked.inputs)
        return {
            "prompt_tokens": inputs,
            "completion_tokens": new,
            "total_tokens": inputs + new,
            "virtual_tokens": virtual,
        }

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}
