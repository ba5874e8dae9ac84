"""Parquet and Arrow files, read through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt.data.located import Located
from softprompt.errors import DataError


def read_parquet(path: Path) -> Iterator[Located]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise _needs_pyarrow(path) from error
    try:
        table = parquet.read_table(path, partitioning=None)
    except (ArrowException, OSError) as error:
        raise _damaged(path, "Parquet", error) from error
    return _rows(table, path)


def read_arrow(path: Path) -> Iterator[Located]:
    """Yield the rows of an Arrow file: the file form (Feather 2) or the stream form.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException, ipc
    except ImportError as error:
        raise _needs_pyarrow(path) from error
    is_file_form = path.read_bytes()[:6] == b"ARROW1"
    try:
        with path.open("rb") as stream:
            reader = ipc.open_file(stream) if is_file_form else ipc.open_stream(stream)
            table = reader.read_all()
    except (ArrowException, OSError) as error:
        raise _damaged(path, "Arrow", error) from error
    return _rows(table, path)


def _rows(table: Any, path: Path) -> Iterator[Located]:
    row = 0
    for batch in table.to_batches(max_chunksize=4096):
        for record in batch.to_pylist():
            row += 1
            yield Located(f"{path.name}, row {row}", record)


def _needs_pyarrow(path: Path) -> DataError:
    return DataError(
        f'reading {path.name} needs pyarrow: pip install "softprompt[data]", or use JSONL or CSV'
    )


def _damaged(path: Path, form: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return DataError(f"{path.name}: not a readable {form} file ({reason}); write it again")
