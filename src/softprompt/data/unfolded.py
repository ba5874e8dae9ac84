"""What the columns of a Parquet or Arrow file unpack to, found before they do: dictionaries and packed buffers."""

from __future__ import annotations

import struct
from typing import Any

from softprompt.errors import excerpt
from softprompt.untrusted import check_unpacked

ROW, _CELL = 300, 100
"""Bytes that a record, and a value in it, take in Python besides what the value has."""
_VERSION_5 = 4
"""In Arrow's enumeration of versions; those before it note that buffers are packed beside a message."""


def check_parquet(metadata: Any, data: bytes, name: str) -> list[str]:
    """Check what a Parquet file's footer and pages have; return the texts, which are to be read as dictionaries.

    Raises:
        DataError: It is more than a file of its size may have.
        ValueError: Footer and pages differ.
    """
    from softprompt.data.parquet_pages import sizes_of_pages

    columns = [metadata.schema.column(at) for at in range(metadata.num_columns)]
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    size = ROW * sum(group.num_rows for group in groups)
    chunks = [(group, column, group.column(at)) for group in groups for at, column in enumerate(columns)]
    pages = sizes_of_pages(data, [chunk for _, _, chunk in chunks])
    for (group, column, chunk), (unpacked, values) in zip(chunks, pages, strict=True):
        width = max(16, column.length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0)
        size += max(unpacked, chunk.total_uncompressed_size, width * max(values, group.num_rows))
    check_unpacked(size, len(data), name)
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def check_arrow(stream: Any, packed: int, name: str) -> None:
    """Check what the packed buffers of an Arrow stream say that they unpack to; see ``check_parquet``."""
    from pyarrow import ipc

    size = 0
    for message in ipc.MessageReader.open_stream(stream):
        size += _announced(message)
        check_unpacked(size, packed, name)


def _announced(message: Any) -> int:
    """Return the bytes that packed buffers of a message unpack to, by the first 8 of each (Arrow's Message.fbs)."""
    data = message.metadata.to_pybytes()

    def number(form: str, at: int) -> int:
        return int(struct.unpack_from(f"<{form}", data, at)[0])

    def field(table: int, index: int) -> int:
        """Return where a field of a flatbuffer's table is; 0 where the table lacks it."""
        names, at = table - number("i", table), 4 + 2 * index
        offset = number("H", names + at) if at < number("H", names) else 0
        return table + offset if offset else 0

    def at_end_of(place: int) -> int:
        return place + number("I", place)

    if message.type not in ("record batch", "dictionary"):
        return 0
    root = at_end_of(0)
    header = at_end_of(field(root, 2))
    if message.type == "dictionary":
        header = at_end_of(field(header, 1))
    version = field(root, 0)
    is_packed = field(header, 3) or (field(root, 4) and (not version or number("h", version) < _VERSION_5))
    if not is_packed or not field(header, 2):
        return 0
    buffers, size = at_end_of(field(header, 2)), 0
    for at in range(buffers + 4, buffers + 4 + 16 * number("I", buffers), 16):
        start, length = struct.unpack_from("<qq", data, at)
        size += max(0, *struct.unpack_from("<q", message.body, start)) if length >= struct.calcsize("q") else 0
    return size


def unfolded(array: Any) -> int:
    """Return about how many bytes a checked array's values have, a dictionary's in the place of each index to it.

    Raises:
        TypeError: They may overlap otherwise, as those of views of lists do.
    """
    import numpy
    from pyarrow import ExtensionArray, compute, types

    if isinstance(array, ExtensionArray):
        return unfolded(array.storage)
    kind, count = array.type, len(array)
    if types.is_dictionary(kind):
        found = compute.sum(compute.take(_lengths(array.dictionary), array.indices)).as_py()
        return _CELL * count + (found or 0)
    if types.is_struct(kind):
        return _CELL * count + sum(map(unfolded, array.flatten()))
    if types.is_map(kind):
        start = array.offsets[0].as_py()
        inside = [each.slice(start, array.offsets[-1].as_py() - start) for each in (array.keys, array.items)]
        return _CELL * count + sum(map(unfolded, inside))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _CELL * count + unfolded(array.flatten())
    if types.is_nested(kind) or types.is_run_end_encoded(kind):
        raise TypeError(f"columns of type {excerpt(str(kind))} are not read; store lists and texts as such")
    if types.is_string_view(kind) or types.is_binary_view(kind):
        lengths = numpy.frombuffer(array.buffers()[1], "<i4")[::4]
        return int(lengths[array.offset : array.offset + count].clip(0).sum(dtype="i8")) + _CELL * count
    return int(array.nbytes) + _CELL * count


def _lengths(values: Any) -> Any:
    """Return the bytes of each value of a dictionary."""
    import pyarrow
    from pyarrow import compute

    try:
        return compute.binary_length(values).cast("int64")
    except NotImplementedError:  # which are no texts, or views of them
        sizes = [unfolded(values.slice(at, 1)) for at in range(len(values))]
        return pyarrow.array(sizes, "int64")
