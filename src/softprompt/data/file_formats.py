"""Every file format of a data set, by suffix; a new one is a reader and one line of a table.

Text formats (JSON lines, a JSON list, CSV, TSV) keep line numbers for their errors; Parquet and
Arrow are read through pyarrow. Class ids that ``datasets`` has names for become these names.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

from softprompt.errors import DataError, first_line
from softprompt.errors import line as one_line
from softprompt.untrusted import check_unpacked, no_collection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Located:
    """A record as it was read and where, so that every error about it can name the line.

    Attributes:
        where: File and line in words, such as ``train.csv, line 12`` or ``record 3``.
        record: Column name to value.
    """

    where: str
    record: Mapping[str, Any]


def as_record(value: object, where: str) -> Located:
    """Return a mapping of column names as a record; raises DataError if it is something else."""
    if not isinstance(value, Mapping):
        got = f"a value of type {type(value).__name__}"
        if isinstance(value, str):
            got = f"the text {value[:40]!r}"
        raise DataError(f"{where}: expected a record such as {{'input': ..., 'output': ...}}, got {got}")
    for name in value:
        if not isinstance(name, str):
            raise DataError(f"{where}: expected column names as text, got {name!r}")
    return Located(where, value)


def read_json_lines(text: str, name: str) -> Iterator[Located]:
    """Yield a record for each line that is not blank; raises DataError if one is not a JSON object."""
    # JSON strings may hold U+2028 and the like bare, so only "\n" ends a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        yield json_record(line, f"{name}, line {number}")


def json_record(line: str, where: str) -> Located:
    """Return the record of a line of JSON; raises DataError if it is not a JSON object."""
    try:
        with no_collection():
            value = json.loads(line, object_pairs_hook=partial(_no_repeats, where=where))
    except (ValueError, RecursionError) as error:
        raise _malformed(error, where) from error
    return as_record(value, where)


def read_json_list(text: str, name: str) -> Iterator[Located]:
    """Yield the objects of one JSON list, each with its line; raises DataError if the text is something else."""
    position = _skip_space(text, 0)
    if text[position] != "[":
        raise _unexpected(text, position, name, "a JSON list of records; if each line is one, name it .jsonl")
    decoder = json.JSONDecoder(object_pairs_hook=partial(_no_repeats, where=name))
    line, counted = 1, 0
    position = _skip_space(text, position + 1)
    is_open = text[position : position + 1] != "]"
    while is_open:
        line += text.count("\n", counted, position)
        counted = position
        try:
            with no_collection():
                value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise _malformed(error, f"{name}, line {at}") from error
        yield as_record(value, f"{name}, line {line}")
        position = _skip_space(text, position)
        is_open = text[position : position + 1] == ","
        if is_open:
            position = _skip_space(text, position + 1)
    if text[position : position + 1] != "]":
        raise _unexpected(text, position, name, "',' or ']' after a record")
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise _unexpected(text, position, name, "the end of the file after the list")


def _no_repeats(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise DataError(f"{where}: the field {key!r} occurs twice in one object; keep one")
        record[key] = value
    return record


def _malformed(error: ValueError | RecursionError, where: str) -> DataError:
    if isinstance(error, DataError):
        return error
    if isinstance(error, RecursionError):
        return DataError(f"{where}: expected a flat record, got JSON nested too deeply to read")
    if not isinstance(error, json.JSONDecodeError):  # Python reads no number of more than 4,300 digits
        return DataError(f"{where}: a number has too many digits ({error}); write it as text")
    return DataError(
        f"{where}: not valid JSON ({error.msg} at column {error.colno}); "
        'expected one object such as {"input": "...", "output": "..."}'
    )


def _unexpected(text: str, position: int, name: str, expected: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    found = repr(text[position : position + 20]) if position < len(text) else "the end of the file"
    return DataError(f"{name}, line {line}: expected {expected}, got {found}")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def read_csv(text: str, name: str) -> Iterator[Located]:
    """Yield the lines of a table, whose quoted values may hold commas and line ends.

    Columns are separated by commas, or by semicolons or tabs where those and not commas give a table.
    """
    separator = _separator(text)
    if separator != ",":
        logger.info("%s: columns are separated by %s, not by commas", one_line(name), _SEPARATORS[separator])
    return _table_records(_csv_lines(text, name, separator), name)


def read_tsv(text: str, name: str) -> Iterator[Located]:
    """Yield the lines of a tab-separated table, in which quotes are ordinary characters."""
    lines = enumerate(text.split("\n"), start=1)
    cells = ((number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip())
    return _table_records(cells, name)


_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_LINES_SNIFFED = 20


def _separator(text: str) -> str:
    """Return the separator whose first lines all have as many cells as the header, two or more; else a comma."""
    for separator in _SEPARATORS:
        try:
            lines = islice(_csv_lines(text, "", separator), _LINES_SNIFFED)
            widths = {len(cells) for _, cells in lines}
        except DataError:
            continue
        if len(widths) == 1 and widths != {1}:
            return separator
    return ","


def _csv_lines(text: str, name: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        first_line = reader.line_num + 1
        # Python's limit is the process's, and smaller than some cells.
        before = csv.field_size_limit(max(len(text), csv.field_size_limit()))
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}, line {first_line}: not valid CSV ({error}); check the quotes, or use JSONL"
            ) from error
        finally:
            csv.field_size_limit(before)
        if cells is None:
            return
        if cells:
            yield first_line, cells


def _table_records(lines: Iterator[tuple[int, list[str]]], name: str) -> Iterator[Located]:
    first_line, header = next(lines)
    _check_header(header, f"{name}, line {first_line}")
    for number, cells in lines:
        if len(cells) != len(header):
            raise DataError(
                f"{name}, line {number}: expected {len(header)} fields ({', '.join(header)}), got {len(cells)}"
            )
        yield Located(f"{name}, line {number}", dict(zip(header, cells, strict=True)))


def _check_header(header: list[str], where: str) -> None:
    if "" in header:
        raise DataError(f"{where}: column {header.index('') + 1} of the header has no name")
    repeated = min((column for column, times in Counter(header).items() if times > 1), default=None)
    if repeated is not None:
        raise DataError(f"{where}: the header names {repeated!r} twice; rename one")


def read_parquet(data: bytes, name: str) -> Iterator[Located]:
    """Yield the records of a Parquet file; raises DataError if pyarrow is not installed, or the file is damaged."""
    try:
        from pyarrow import BufferReader, Table, parquet
    except ImportError as error:
        raise _needs_pyarrow(name) from error

    def read() -> Any:
        from softprompt.data.unfolded import check_parquet

        texts = check_parquet(parquet.read_metadata(BufferReader(data)), data, name)
        with parquet.ParquetFile(BufferReader(data), read_dictionary=texts) as file:
            # A batch over two groups would have two dictionaries, which pyarrow cannot nest.
            groups = (file.iter_batches(row_groups=[number]) for number in range(file.num_row_groups))
            return Table.from_batches(chain.from_iterable(groups), file.schema_arrow)

    return _table_of(data, name, "Parquet", read)


def read_arrow(data: bytes, name: str) -> Iterator[Located]:
    """Yield the records of an Arrow file, of the file form (Feather 2) or the stream form; see ``read_parquet``."""
    try:
        from pyarrow import BufferReader, Table, ipc
    except ImportError as error:
        raise _needs_pyarrow(name) from error

    def read() -> Any:
        from softprompt.data.unfolded import check_arrow

        # The file form is a stream behind 8 bytes, with an index at its end, which could point elsewhere.
        start = 8 if data.startswith(b"ARROW1") else 0
        count = ipc.open_file(BufferReader(data)).num_record_batches if start else None
        stream = BufferReader(data)
        stream.seek(start)
        check_arrow(stream, len(data), name)
        stream.seek(start)
        reader = ipc.open_stream(stream)
        batches = list(reader)
        if count not in (None, len(batches)):
            raise ValueError(f"expected {count} batches, got {len(batches)}")
        return Table.from_batches(batches, reader.schema)

    return _table_of(data, name, "Arrow", read)


def _table_of(data: bytes, name: str, form: str, read: Callable[[], Any]) -> Iterator[Located]:
    """Yield the records of a table that is read and then checked, for its offsets may point anywhere.

    Raises:
        DataError: The file is damaged, or unpacks to too much.
    """
    from softprompt.data.unfolded import ROW, unfolded

    try:
        table = read()
        _validate(table)
        size = ROW * table.num_rows + sum(unfolded(chunk) for each in table.columns for chunk in each.chunks)
    except DataError:
        raise
    except Exception as error:  # pyarrow lets errors of many kinds through
        raise damaged(name, form, error) from error
    check_unpacked(size, len(data), name)
    return with_class_names(_column_records(table, name, form), _features(table))


def _validate(table: Any) -> None:
    """Check every offset of a table; a text that is not UTF-8 is left to the message with its record."""
    try:
        table.validate(full=True)
    except ValueError as error:
        if "Invalid UTF8" not in str(error):
            raise
        # Which stops at the first text: the offsets of the others are still to be checked.
        import pyarrow

        forms = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}

        def as_bytes(array: Any) -> Any:
            if isinstance(array, pyarrow.DictionaryArray):
                return pyarrow.DictionaryArray.from_arrays(array.indices, as_bytes(array.dictionary))
            return array.view(forms[array.type]) if array.type in forms else array

        for chunk in (chunk for column in table.columns for chunk in column.chunks):
            as_bytes(chunk).validate(full=True)


def _features(table: Any) -> Mapping[str, Any]:
    """Return the features that ``datasets`` wrote into a file beside its columns."""
    written = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        found = json.loads(written).get("info", {}).get("features")
    except (ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _column_records(table: Any, name: str, form: str) -> Iterator[Located]:
    number = 0
    for batch in table.to_batches(max_chunksize=4096):
        try:
            records = batch.to_pylist()
        except Exception:  # a text that is not UTF-8, a time that Python has not, an unknown time zone
            # One by one, to know which.
            records = (batch.slice(at, 1) for at in range(batch.num_rows))
        for record in records:
            number += 1
            where = f"{name}, record {number}"
            try:
                found = record if isinstance(record, dict) else record.to_pylist()[0]
            except UnicodeDecodeError as error:
                raise not_utf8(error, where) from error
            except Exception as error:
                raise damaged(where, form, error) from error
            yield Located(where, found)


def with_class_names(records: Iterable[Located], features: Mapping[str, Any]) -> Iterator[Located]:
    """Yield records with the names of class ids in their place, for columns and lists of ``ClassLabel``.

    Args:
        records: The records.
        features: Column name to feature, as ``datasets.Features.to_dict`` gives it.
    """
    names: dict[str, Sequence[str]] = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, Mapping) else None
        if isinstance(inner, Mapping) and inner.get("_type") == "ClassLabel":
            own = inner.get("names")
            names |= {column: own} if own and isinstance(own, list | tuple) else {}
    for located in records:
        named = {
            column: _class_name(located.record[column], own)
            for column, own in names.items()
            if column in located.record
        }
        yield Located(located.where, {**located.record, **named}) if named else located


def _class_name(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class id, or of each in a list; None for -1, which ``datasets`` has for no label."""
    if isinstance(value, list | tuple):
        return [_class_name(each, names) for each in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return names[value] if 0 <= value < len(names) else None


def not_utf8(error: UnicodeDecodeError, where: str) -> DataError:
    """Return the error of bytes that are not text."""
    return DataError(f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it to UTF-8")


def _needs_pyarrow(name: str) -> DataError:
    return DataError(f'reading {name} needs pyarrow: pip install "softprompt[data]", or use JSONL or CSV')


def damaged(name: str, form: str, error: Exception) -> DataError:
    """Return the error of a file that is not what its suffix says."""
    return DataError(f"{name}: not a readable {form} file ({first_line(error)}); write it again")


TEXT_READERS: Mapping[str, Callable[[str, str], Iterator[Located]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json_list,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
"""Readers of the text of a file, which also take its name for errors."""
BINARY_READERS: Mapping[str, Callable[[bytes, str], Iterator[Located]]] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
"""Readers of the bytes of a file, which also take its name for errors."""
SUFFIXES = (*TEXT_READERS, *BINARY_READERS)
