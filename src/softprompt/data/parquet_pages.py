"""What the pages of a Parquet file say that they unpack to, which its footer may not say truly (parquet.thrift)."""

from __future__ import annotations

from typing import Any

_MOST_PAGES, _BYTES_OF_A_PAGE = 10_000, 100
"""Pages that any file may have, and bytes for each further one."""
_PREFIXED = 7
"""Encoding whose values begin with those before them, so that each may be as long as the page."""
_MOST = 1 << 31


def sizes_of_pages(data: bytes, chunks: list[Any]) -> list[tuple[int, int]]:
    """Return the bytes and the values that the pages of each column chunk unpack to.

    Raises:
        ValueError: the pages are not where the footer says, or too many.
    """
    left, found = _MOST_PAGES + len(data) // _BYTES_OF_A_PAGE, []
    for chunk in chunks:
        at, size, values = chunk.data_page_offset, 0, 0
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < at:
            at = chunk.dictionary_page_offset
        end = at + chunk.total_compressed_size
        while 0 < at < end <= len(data) and left:
            header, at = _fields(data, at)
            unpacked, packed = header[2], header[3]
            inside = header.get(5) or header.get(8) or {}
            count, encoding = inside.get(1, 0), inside.get(4 if 8 in header else 2)
            if not all(0 <= each < _MOST for each in (unpacked, packed, count)) or (5 in header and 8 in header):
                raise ValueError("the header of a page is damaged")
            size += unpacked * (max(1, count) if encoding == _PREFIXED else 1)
            values, at, left = values + count, at + packed, left - 1
        if at != end or values < chunk.num_values:
            raise ValueError("its pages are not what its footer says, encrypted or too many")
        found.append((size, values))
    return found


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Return a variable-length number, and where it ends."""
    value = shift = 0
    while shift < 64:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number is too long")


def _fields(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a structure of thrift's compact protocol by their numbers, and where it ends."""
    found, field = dict[int, Any](), 0
    while head := data[at]:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _number(data, at)
            field = field >> 1
        if field in found or field >= 1 << 15:
            raise ValueError("a field of a page's header is there twice")
        found[field], at = _value(data, at, head & 15)
    return found, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind in (4, 5, 6):
        value, at = _number(data, at)
        return (value >> 1) ^ -(value & 1), at
    if kind in (3, 7):
        return None, at + (1 if kind == 3 else 8)
    if kind == 8:
        length, at = _number(data, at)
        return None, at + length
    if kind == 12:
        return _fields(data, at)
    raise ValueError("a page's header has a field of another kind")
