"""Where records come from: files, standard input, memory, ``datasets`` and the Hub; each record with its place."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from softprompt.data.file_formats import (
    BINARY_READERS,
    SUFFIXES,
    TEXT_READERS,
    Located,
    as_record,
    damaged,
    not_utf8,
    with_class_names,
)
from softprompt.errors import DataError, first_line, line, nearest
from softprompt.untrusted import check_unpacked
from softprompt.world import world

logger = logging.getLogger(__name__)

DataSource: TypeAlias = str | Path | Iterable[Mapping[str, Any]] | Iterable[Located]
"""A path, ``-`` for standard input, a data set of the Hub, records, or an object of ``datasets`` or pandas."""

Use: TypeAlias = Literal["train", "validation", "test"]

_SPLITS: Mapping[str | None, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "validation", "valid", "val", "dev"),
}
"""Names of the split that is read for a use, the first that exists."""

STANDARD_INPUT = "-"
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_STEP = 1024
"""Packed bytes at a time; zstd may make 32 MiB of them."""
_HUB = re.compile(r"(hf://datasets/)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))??(?::([\w.-]*))?")
"""``org/name``, ``name:split`` and ``name:config:split``, each with or without ``org/``."""


def read_source(source: DataSource, use: Use | None = None) -> Iterator[Located]:
    """Yield the records of ``source`` with where each was read; at least one.

    Args:
        source: A path (its suffix names the format), ``-`` for standard input, ``org/name``, ``name:split`` or
            ``name:config:split`` of the Hub (a file of that name wins), an iterable of mappings, a pandas
            DataFrame, a ``datasets.Dataset`` or a ``DatasetDict``.
        use: Which split of several is read; None reads a single one.

    Raises:
        DataError: The source is missing, empty, of an unknown format, or damaged; or several splits leave
            the choice open.
    """
    source = opened(source)
    splits = _splits(source)
    if splits is not None:
        source = splits[_split_for(use, splits)]
    if isinstance(source, str | Path):
        yield from _at_least_one(_file_records(Path(source)), f"{Path(source).name}")
    else:
        yield from _at_least_one(_memory_records(source), "the data")


def opened(source: DataSource) -> DataSource:
    """Return a source that can be read again: a data set of the Hub as loaded, standard input as records.

    Raises:
        DataError: It cannot be read.
    """
    if isinstance(source, str) and source == STANDARD_INPUT:
        return _standard_input()
    hub = _hub_name(source)
    return source if hub is None else _from_hub(str(source), *hub)


def validation_split_of(source: DataSource) -> DataSource | None:
    """Return the validation split of an opened source; None where it has no splits or none of that name."""
    splits = _splits(source) or {}
    return next((splits[name] for name in _SPLITS["validation"] if name in splits), None)


def json_lines(data: bytes, name: str) -> Iterator[str]:
    """Yield the records of a file's bytes as lines of JSON; those of ``.jsonl`` as they are, right or wrong.

    Raises:
        DataError: The file is not what its name says, or unpacks to too much.
    """
    content, suffix = _unpacked(data, name), _suffixes(name)[0]
    if not content.removeprefix(codecs.BOM_UTF8).strip():  # as the output of a job that found nothing
        return
    if suffix == ".jsonl":
        yield from (line for line in _decoded(content, name).split("\n") if line.strip())
    else:  # what is neither text nor a number is none as a list either
        yield from (
            json.dumps(dict(each.record), default=lambda value: [str(value)]) for each in _records(content, name)
        )


def data_fingerprint(source: DataSource, records: Sequence[Located]) -> dict[str, str | int]:
    """Return what identifies data that was read: ``path`` (a name, no folders), ``sha256`` and ``rows``.

    A file has the hash of its bytes, everything else that of its records.
    """
    if isinstance(source, str | Path) and Path(source).is_file():
        name, content = Path(source).name, Path(source).read_bytes()
    else:
        name = "rows in memory"
        if isinstance(source, str):
            name = "standard input" if source == STANDARD_INPUT else source
        content = json.dumps([dict(each.record) for each in records], sort_keys=True, default=str).encode()
    return {"path": name, "sha256": hashlib.sha256(content).hexdigest(), "rows": len(records)}


def _at_least_one(records: Iterator[Located], name: str) -> Iterator[Located]:
    found = False
    for record in records:
        found = True
        yield record
    if not found:
        raise DataError(f"{name}: expected at least one record, got none")


def _file_records(path: Path) -> Iterator[Located]:
    check_file(path)
    check_name(path.name)
    return _records(_unpacked(path.read_bytes(), path.name), path.name)


def _records(data: bytes, name: str) -> Iterator[Located]:
    """Yield the records of the unpacked bytes of a file."""
    suffix = _suffixes(name)[0]
    if suffix in BINARY_READERS:
        return BINARY_READERS[suffix](data, name)
    return TEXT_READERS[suffix](_decoded(data, name), name)


def _suffixes(name: str) -> tuple[str, str]:
    """Return the suffix that says the format of a file, and the one behind it if it is packed."""
    path = Path(name.lower())
    return (Path(path.stem).suffix, path.suffix) if path.suffix in _PACKED else (path.suffix, "")


def is_data_file(name: str) -> bool:
    """Return whether a file of this name has a format that is read."""
    suffix, packed = _suffixes(name)
    return suffix in TEXT_READERS or (suffix in BINARY_READERS and not packed)


def check_name(name: str) -> None:
    """Raise DataError if a file of this name has no format that is read."""
    suffix, packed = _suffixes(name)
    if not is_data_file(name):
        raise DataError(
            f"{name}: expected one of the suffixes {', '.join(SUFFIXES)}, "
            f"got {suffix + packed or 'none'!r}{nearest(suffix, SUFFIXES)}; "
            f"those of text may have {' or '.join(_PACKED)} behind them"
        )


def check_file(path: Path) -> None:
    """Raise DataError if there is no file at ``path``, or an empty one."""
    if path.is_dir():
        raise DataError(f"{path}: expected a data file, got a directory; name a file in it")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hub = (
            f"; a data set of the Hub is hf://datasets/{path}"
            if not path.suffix and _HUB.fullmatch(str(path))
            else ""
        )
        raise DataError(f"{path}: no such data file{nearest(path.name, siblings)}{hub}")
    if not path.is_file():
        raise DataError(f"{path}: expected a data file, got a device or a pipe; pipe data in and name - instead")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected at least one record")


def _unpacked(data: bytes, name: str) -> bytes:
    """Return the bytes of a file, unpacked in steps, so that too many are noticed in time."""
    packed = _suffixes(name)[1]
    if not packed:
        return data
    unpacker, parts, size = _unpacker(name, packed), list[bytes](), 0
    try:
        for at in range(0, len(data), _STEP):
            left = data[at : at + _STEP]
            while left:  # of one stream behind another
                unpacker = _unpacker(name, packed) if unpacker.eof else unpacker
                parts.append(unpacker.decompress(left))
                size += len(parts[-1])
                check_unpacked(size, len(data), name)
                left = unpacker.unused_data.lstrip(b"\0")  # as tapes are filled up
        if not unpacker.eof:
            raise EOFError("it ends too early")
    except DataError:
        raise
    except Exception as error:  # zlib's, zstandard's
        raise damaged(name, _PACKED[packed], error) from error
    return b"".join(parts)


def _unpacker(name: str, packed: str) -> Any:
    if packed == ".gz":
        return zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f'reading {name} needs zstandard: pip install "softprompt[data]"') from error
    return zstandard.ZstdDecompressor().decompressobj()


def _decoded(data: bytes, name: str) -> str:
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise not_utf8(error, f"{name}, line {line}") from error
    if not text.strip():
        raise DataError(f"{name}: the file is empty; expected at least one record")
    return text


def _standard_input() -> list[Any]:
    """Read standard input to its end: a JSON list, JSON lines, or a table, by its first character."""
    text = world().from_main(_standard_text)
    suffix = {"[": ".json", "{": ".jsonl"}.get(text.lstrip()[0], ".csv")
    logger.info("standard input is read as %s", suffix)
    return list(TEXT_READERS[suffix](text, "standard input"))


def _standard_text() -> str:
    if sys.stdin.isatty():
        raise DataError("no data on standard input; pipe it in, or name a file instead of -")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _memory_records(records: Any) -> Iterator[Located]:
    if isinstance(records, Mapping):
        raise DataError(f"expected a list of records, got one {type(records).__name__}; put it into a list")
    if hasattr(records, "notna") and hasattr(records, "columns"):
        records = _frame_rows(records)
    elif hasattr(records, "to_pylist"):  # a table of pyarrow
        records = records.to_pylist()
    if not isinstance(records, Iterable):
        raise DataError(
            f"expected a path, a list of records or a Dataset, got {type(records).__name__}; pass one of these"
        )
    features: Any = getattr(records, "features", None)
    found = (
        row if isinstance(row, Located) else as_record(row, f"record {number}")
        for number, row in enumerate(records, start=1)
    )
    return with_class_names(found, features.to_dict() if features else {})


def _frame_rows(frame: Any) -> list[Any]:
    """Return the rows of a pandas DataFrame, with None for what is missing."""
    if not frame.columns.is_unique:
        raise DataError(f"the DataFrame has a column twice, of {', '.join(map(str, frame.columns))}; rename one")
    rows: list[Any] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


def _splits(source: Any) -> Mapping[str, Any] | None:
    """Return the splits of a ``DatasetDict``, whose columns are those of each; None for everything else."""
    return source if isinstance(source, Mapping) and hasattr(source, "column_names") else None


def _split_for(use: Use | None, splits: Mapping[str, Any]) -> str:
    found = [name for name in _SPLITS.get(use, ()) if name in splits]
    if use in (None, "train") and len(splits) == 1:
        found = list(splits)
    if not found:
        which = f"one for {use}" if use else "one"
        raise DataError(f"expected {which} among the splits {', '.join(splits)}; pass one of them (name:split)")
    if len(splits) > 1:
        logger.info("of the splits %s, %s is read", line(", ".join(splits)), line(found[0]))
    return found[0]


def _hub_name(source: Any) -> tuple[str, str | None, str | None] | None:
    """Return repository, configuration and split of a data set of the Hub; None for what means a file.

    A mistyped file is not taken for one: a name has ``org/`` or ``:split``, no suffix of a data file, and its first
    part is no folder here.
    """
    match = _HUB.fullmatch(source) if isinstance(source, str) else None
    if match is None or Path(source).exists():
        return None
    explicit, name, config, split = match.groups()
    organisation, slash, _ = name.partition("/")
    is_file = {suffix.lower() for suffix in Path(name).suffixes} & {*SUFFIXES, *_PACKED}
    is_here = split is None and (not slash or Path(organisation).exists())
    if not explicit and (is_file or is_here):
        return None
    return name, config, split or None


def _from_hub(word: str, name: str, config: str | None, split: str | None) -> Any:
    logger.info("no file %s here: reading the data set %s from the Hugging Face Hub", word, name)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f'no file {word} here, and a data set of the Hub needs: pip install "softprompt[data]"'
        ) from (error)
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            # One request, since load_dataset tries for half a minute where there is no network.
            HfApi().dataset_info(name, timeout=10)
        return load_dataset(name, config, split=split)
    except Exception as error:
        raise DataError(
            f"no file {word} here, and the data set {name} cannot be read from the Hub ({first_line(error)}); "
            "check the name (org/name, name:split or name:config:split) and the network, or name a file"
        ) from error
