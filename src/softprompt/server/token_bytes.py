"""The bytes behind a token that is a part of a character."""

from __future__ import annotations

import re

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REST = [byte for byte in range(256) if byte not in _SHOWN]
# The alphabet of byte-level vocabularies (GPT-2's): what prints stands for itself, the rest follow 255.
_ALPHABET = {chr(byte): byte for byte in _SHOWN} | {
    chr(256 + number): byte for number, byte in enumerate(_REST)
}


def bytes_of(symbol: str, text: str) -> bytes | None:
    """Return the bytes of a token; None where they cannot be told.

    Args:
        symbol: The token as in the vocabulary.
        text: What it decodes to alone, with U+FFFD for parts of characters.
    """
    if "\ufffd" not in text:
        return text.encode()
    if fallback := _FALLBACK.fullmatch(symbol):
        return bytes([int(fallback[1], 16)])
    if not all(character in _ALPHABET for character in symbol):
        return None
    found = bytes(_ALPHABET[character] for character in symbol)
    return found if found.decode(errors="replace") == text else None
