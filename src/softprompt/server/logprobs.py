"""Log-probabilities of tokens in OpenAI's shapes, with the texts, bytes and offsets of single tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from softprompt.generation import EchoEvent, TokenEvent, TopLogProbs

_LONGEST = 4
"""Bytes of a character at most."""


class TokenTexts:
    """Texts and bytes of single tokens, as log-probabilities name them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """Return a token's text; for a part of a character its symbol in the vocabulary."""
        if token_id not in self._known:
            self._known[token_id] = self._text(token_id)
        return self._known[token_id]

    def likeliest(self, own: int, logprob: float | None, top: TopLogProbs) -> dict[str, float]:
        """Return the top log-probabilities and the chosen token's; of equal texts the likelier token's."""
        found: dict[str, float] = {}
        for token, value in top:
            found.setdefault(self(token), value)
        if logprob is not None:
            found.setdefault(self(own), logprob)
        return found

    def bytes(self, token_id: int) -> list[int] | None:
        """Return a token's bytes; None where they are unknown."""
        symbol, text = self._symbol(token_id), self.decoded([token_id])
        found = bytes_of(symbol, text if "\ufffd" in text else self(token_id))
        return None if found is None else list(found)

    def decoded(self, ids: Sequence[int]) -> str:
        """Return the text of tokens together."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a special one, which texts leave out."""
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
    """Character offset of the next token (``text_offset``).

    Attributes:
        at: Characters before it.
        parts: Tokens of an incomplete character.
    """

    at: int = 0
    parts: list[int] = field(default_factory=list)

    def take(self, texts: TokenTexts, token_id: int) -> int:
        """Advance past a token, and return the offset at which its text begins."""
        begin = self.at
        if texts.is_special(token_id):
            return begin
        self.parts.append(token_id)
        text = texts.decoded(self.parts)
        if not text.endswith("\ufffd"):
            self.at += len(text if len(self.parts) > 1 else texts(token_id))
            self.parts.clear()
        elif len(self.parts) == _LONGEST:  # bytes that are no character
            self.at += len(text)
            self.parts.clear()
        return begin


@dataclass(slots=True)
class Scores:
    """Log-probabilities of consecutive tokens."""

    ids: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    top: list[TopLogProbs] = field(default_factory=list)

    @classmethod
    def of(cls, event: TokenEvent | EchoEvent) -> Self:
        """Return the log-probabilities of an event's tokens."""
        scores = cls()
        scores.take(event)
        return scores

    def take(self, event: TokenEvent | EchoEvent) -> None:
        """Append an event's tokens."""
        if isinstance(event, TokenEvent):
            self.ids.append(event.token_id)
            self.values.append(event.logprob)
            self.top.append(event.top_logprobs)
            return
        self.ids += event.token_ids
        self.values += event.logprobs
        self.top += event.top_logprobs

    def completion(self, texts: TokenTexts, position: Position, *, top: bool) -> dict[str, Any]:
        """Return the ``logprobs`` of a completion; ``position`` advances past the tokens."""
        names = [texts(token) for token in self.ids]
        offsets = [position.take(texts, token) for token in self.ids]
        tokens = zip(self.ids, self.values, self.top, strict=True)
        likeliest = [None if v is None else texts.likeliest(i, v, t) for i, v, t in tokens]
        return {
            "tokens": names,
            "token_logprobs": list(self.values),
            "top_logprobs": likeliest if top else None,
            "text_offset": offsets,
        }

    def chat(self, texts: TokenTexts) -> dict[str, Any]:
        """Return the ``logprobs`` of a chat completion."""
        tokens = zip(self.ids, self.values, self.top, strict=True)
        return {
            "content": [
                {**_named(texts, token, value), "top_logprobs": [_named(texts, i, v) for i, v in top]}
                for token, value, top in tokens
            ],
            "refusal": None,
        }


def _named(texts: TokenTexts, token: int, value: float | None) -> dict[str, Any]:
    return {"token": texts(token), "logprob": value, "bytes": texts.bytes(token)}


_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REST = [byte for byte in range(256) if byte not in _SHOWN]
# The alphabet of byte-level BPE (GPT-2): printable bytes are themselves, the others follow 255.
_ALPHABET = {chr(byte): byte for byte in _SHOWN} | {chr(256 + number): byte for number, byte in enumerate(_REST)}


def bytes_of(symbol: str, text: str) -> bytes | None:
    """Return the bytes of a token; None where they are unknown.

    Args:
        symbol: Its symbol in the vocabulary.
        text: Its text when decoded alone, with U+FFFD for parts of characters.
    """
    if "\ufffd" not in text:
        return text.encode()
    if fallback := _FALLBACK.fullmatch(symbol):
        return bytes([int(fallback[1], 16)])
    if not all(character in _ALPHABET for character in symbol):
        return None
    found = bytes(_ALPHABET[character] for character in symbol)
    return found if found.decode(errors="replace") == text else None
