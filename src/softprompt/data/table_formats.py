"""CSV and TSV: a header line, then rows with as many fields as the header."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from softprompt.data.located import Located
from softprompt.errors import DataError


def read_csv(text: str, name: str) -> Iterator[Located]:
    """Yield the rows of a comma-separated table; quoted values may hold commas and line ends.

    Raises:
        DataError: The header is unusable, or a row has another number of fields than it.
    """
    return _records(_csv_rows(text, name), name)


def read_tsv(text: str, name: str) -> Iterator[Located]:
    """Yield the rows of a tab-separated table, in which quotes are ordinary characters.

    Raises:
        DataError: The header is unusable, or a row has another number of fields than it.
    """
    lines = enumerate(text.split("\n"), start=1)
    rows = ((number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip())
    return _records(rows, name)


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        first_line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}, line {first_line}: not valid CSV ({error}); check the quotes, "
                "or use JSONL"
            ) from error
        if row is None:
            return
        if row:
            yield first_line, row


def _records(rows: Iterator[tuple[int, list[str]]], name: str) -> Iterator[Located]:
    first_line, header = next(rows)
    _check_header(header, f"{name}, line {first_line}")
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{name}, line {number}: expected {len(header)} fields "
                f"({', '.join(header)}), got {len(row)}"
            )
        yield Located(f"{name}, line {number}", dict(zip(header, row, strict=True)))


def _check_header(header: list[str], where: str) -> None:
    if "" in header:
        raise DataError(f"{where}: column {header.index('') + 1} of the header has no name")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f"{where}: the header names {repeated[0]!r} twice; rename one")
