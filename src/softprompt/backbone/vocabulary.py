"""The tokens that two bases share, as pairs of ids.

Kinds of tokenizers spell one text differently: byte-level ones write a space as ``Ġ`` and a byte
beyond ASCII as a letter of their own, SentencePiece writes ``▁`` and ``<0xE9>``, and WordPiece marks
what continues a word (``##ing``) instead of what begins one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from transformers import PreTrainedTokenizerBase

_MARKS = ("Ġ", "▁", "##")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPELT_AS_THEMSELVES = (*range(33, 127), *range(161, 173), *range(174, 256))


def shared_ids(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, rows: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Return the ids of tokens for the same text, in the order of the first vocabulary.

    Within one kind of tokenizer these are tokens of equal spelling; across kinds, tokens of equal
    bytes, the space before a word counted. Special tokens are left out (their names are conventions,
    their embeddings are not), and so are tokens without a row in their base's table.

    Args:
        first: Tokenizer of one base.
        second: Tokenizer of the other.
        rows: Rows of the two embedding tables.
    """
    special = {*first.all_special_tokens, *second.all_special_tokens}
    one, other = (
        {token: own for token, own in words.get_vocab().items() if token not in special and own < n}
        for words, n in zip((first, second), rows, strict=True)
    )
    kinds = _kind(one), _kind(other)
    # Within one kind the spelling itself is compared, as if it said nothing more.
    same = kinds[0] == kinds[1]
    here, there = (_by_bytes(own, "" if same else kind) for own, kind in zip((one, other), kinds, strict=True))
    pairs = sorted((own, there[text]) for text, own in here.items() if text in there)
    return [own for own, _ in pairs], [found for _, found in pairs]


def _kind(vocabulary: Mapping[str, int]) -> str:
    """Return the mark that most tokens begin with; none where no token has one."""
    counts = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in _MARKS}
    mark = max(_MARKS, key=counts.__getitem__)
    return mark if counts[mark] else ""


def _by_bytes(vocabulary: Mapping[str, int], kind: str) -> dict[bytes, int]:
    """Return ids by the bytes they stand for; of two for the same bytes the one spelt as text."""
    found: dict[bytes, int] = {}
    for token, own in sorted(vocabulary.items(), key=lambda each: bool(_BYTE.fullmatch(each[0]))):
        found.setdefault(_bytes_of(token, kind), own)
    return found


def _bytes_of(token: str, kind: str) -> bytes:
    match kind:
        case "Ġ" if set(token) <= _letters().keys():
            return bytes(_letters()[letter] for letter in token)
        case "▁":
            byte = _BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        case "##":
            return (token[2:] if token.startswith("##") else f" {token}").encode()
    return token.encode()


@cache
def _letters() -> dict[str, int]:
    """Return the byte of each letter of byte-level tokenizers (Radford et al. 2019)."""
    others = [byte for byte in range(256) if byte not in _SPELT_AS_THEMSELVES]
    own = {chr(byte): byte for byte in _SPELT_AS_THEMSELVES}
    return own | {chr(256 + number): byte for number, byte in enumerate(others)}
