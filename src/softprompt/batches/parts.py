"""The output of a batch: one file a part, written at once, and the plan that a run must have to go on with it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt.artifacts import MOST_TEXT_BYTES, parse_object, read_bytes, require_no_file, write_atomically
from softprompt.errors import ArtifactError, DataError, OutputExistsError, UsageError, first_line

PLAN = "batch.json"
LOST = "the worker was lost or failed"
"""How the error begins of all records of a part that has no answer, and is computed again on resumption."""

Row = dict[str, Any]
"""A record, or what was answered to one."""


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """The files of a batch in a folder, in the order of their names; a part is there whole, or not at all.

    Attributes:
        folder: Where they are.
        form: ``jsonl`` or ``parquet``.
    """

    folder: Path
    form: str

    @classmethod
    def planned(cls, folder: Path, form: str, plan: Mapping[str, Any], *, resume: bool) -> Parts:
        """Return the parts of a batch that can begin in an empty folder, or go on there; nothing is written yet.

        Raises:
            OutputExistsError: The folder is not empty, and this is no resumption.
            UsageError: It holds no batch, another one, or one whose plan cannot be read.
        """
        file, wanted = folder / PLAN, json.loads(json.dumps(plan))
        require_no_file(folder)
        if not resume:
            if folder.is_dir() and any(folder.iterdir()):
                what = "a batch; continue it with --resume, or" if file.exists() else "files of something else;"
                raise OutputExistsError(f"{folder} holds {what} name another output")
            return cls(folder, form)
        if not file.exists():
            raise UsageError(f"nothing to resume in {folder}: it holds no batch; start it without --resume")
        try:
            found = parse_object(read_bytes(file, MOST_TEXT_BYTES).decode(errors="replace"), str(file))
        except ArtifactError as error:
            raise UsageError(f"{error}, or begin anew in another output") from error
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise UsageError(
                    f"the batch in {folder} has {name} {found.get(name)!r}, not {wanted[name]!r}; give the same to "
                    "resume, or name another output"
                )
        return cls(folder, form)

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Make the folder, and write down what a run must have in common with this one to go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / PLAN, json.dumps(plan, indent=2) + "\n")

    def path(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:06d}.{self.form}"

    def has(self, number: int) -> bool:
        """Whether a part is finished, and not lost; raises DataError if it cannot be read."""
        path = self.path(number)
        return path.exists() and not str(self._read(path)[0]["error"]).startswith(LOST)

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Write a part, in whole."""
        if self.form == "parquet":
            write_atomically(self.path(number), _parquet(rows))
        else:
            write_atomically(self.path(number), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def rows(self) -> Iterator[Row]:
        """Yield what is written, in order; raises DataError for a part that cannot be read."""
        for path in sorted(self.folder.glob(f"part-*.{self.form}")):
            yield from self._read(path)

    def _read(self, path: Path) -> list[Row]:
        try:
            if self.form == "parquet":
                from pyarrow import parquet

                rows = parquet.read_table(path).to_pylist()
                found = [{**row, "probabilities": json.loads(row.get("probabilities") or "null")} for row in rows]
            else:
                lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
                found = [dict(json.loads(line)) for line in lines]
            if not found or any("error" not in row for row in found):
                raise ValueError("a row has no error, be it null")
        except (ValueError, TypeError, AttributeError, OSError, RuntimeError) as error:  # of JSON and of Arrow
            raise DataError(
                f"expected answers of a batch in {path}, it cannot be read ({first_line(error)}); delete it, and "
                "--resume computes it again"
            ) from error
        return found


def _parquet(rows: Sequence[Row]) -> bytes:
    """Return rows as a Parquet file; columns are those of all rows, and what is no scalar is JSON."""
    import pyarrow
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [_scalar(row.get(name)) for row in rows] for name in names}
    # A column without a value in one part must have the type that it has in others.
    texts = [name for name, each in columns.items() if set(map(type, each)) <= {str, type(None)}]
    typed = {name: pyarrow.array(columns[name], pyarrow.string()) for name in texts}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns | typed), buffer)
    return buffer.getvalue()


def _scalar(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
