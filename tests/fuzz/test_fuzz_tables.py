"""Arrow and Parquet files with wrong bytes: each is read or refused, and the process goes on."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.data.file_formats import BINARY_READERS
from softprompt.errors import DataError

MUTANTS = 150
"""Of each form; before tables were checked, about one in three hundred ended the process."""


def written(folder: Path) -> list[Path]:
    """Write a small table in every form, its columns of the kinds that have offsets."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    columns = {
        "input": ["a b", "ç", None],
        "output": ["x", "y", "z"],
        "list": [["p"], [], ["q", "r"]],
        "dictionary": pa.array(["u", "v", "u"]).dictionary_encode(),
        "view": pa.array(["aa", "b" * 20, None], pa.string_view()),
    }
    table = pa.table(columns)
    for name, new in (("file.arrow", ipc.new_file), ("stream.arrow", ipc.new_stream)):
        with new(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    parquet.write_table(table.drop(["view"]), folder / "table.parquet")
    return [folder / name for name in ("file.arrow", "stream.arrow", "table.parquet")]


def read_mutants(source: Path, count: int) -> None:
    """Read a file with one to five bytes changed, again and again."""
    good, changed = source.read_bytes(), source.with_name(f"changed{source.suffix}")
    generator = random.Random(source.name)
    for _ in range(count):
        data = bytearray(good)
        for _ in range(generator.choice([1, 1, 2, 5])):
            at = generator.randrange(len(data))
            flipped = data[at] ^ (1 << generator.randrange(8))
            data[at] = generator.choice([0, 255, 127, 128, flipped, generator.randrange(256)])
        changed.write_bytes(data)
        try:
            list(BINARY_READERS[source.suffix](changed))
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["file", "stream", "parquet"])
def test_changed_bytes_are_read_or_refused(tmp_path, number):
    pytest.importorskip("pyarrow")
    path = written(tmp_path)[number]
    # In a process of its own: what this is about would end this one.
    code = "import sys; sys.path[:0] = sys.argv[2:]; from fuzz import test_fuzz_tables as t\n"
    code += "t.read_mutants(t.Path(sys.argv[1]), t.MUTANTS)"
    command = [sys.executable, "-c", code, str(path), str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_records_without_values_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather

    feather.write_feather(
        pa.table({"input": pa.nulls(10**9)}), tmp_path / "many.feather", compression="uncompressed"
    )
    with pytest.raises(DataError, match="1,000,000,000 records without a value"):
        list(BINARY_READERS[".feather"](tmp_path / "many.feather"))


@pytest.mark.parametrize("names", ["5", '"ab"', '{"a": 1}', '["x"', "[" * 5000])
def test_names_of_classes_that_are_no_names_are_passed_over(tmp_path, names):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    feature = '{"info": {"features": {"output": {"_type": "ClassLabel", "names": ' + names + "}}}}"
    table = pa.table({"input": ["a"], "output": [0]}).replace_schema_metadata({"huggingface": feature})
    parquet.write_table(table, tmp_path / "table.parquet")
    (found,) = BINARY_READERS[".parquet"](tmp_path / "table.parquet")
    assert found.record == {"input": "a", "output": 0}
