"""Arrow and Parquet files with wrong bytes: each is read or refused, and the process goes on."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from oracles.slow import only
from softprompt.data import read_source
from softprompt.errors import DataError

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
MUTANTS = int(EXAMPLES or 150)
"""Of each form; before tables were checked, about one in three hundred ended the process."""


def temporal():
    """Return the types of dates and times that both forms have."""
    import pyarrow as pa

    units = "ms", "us", "ns"
    zones = None, "UTC", "Europe/Berlin"
    stamps = [pa.timestamp(unit, zone) for unit in units for zone in zones]
    return [*stamps, *map(pa.duration, units), pa.date32(), pa.time32("ms"), pa.time64("us")]


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
        "map": pa.array([[("k", 1)], None, [("l", 2), ("m", None)]], pa.map_(pa.string(), pa.int32())),
        "decimal": pa.array([1, None, 3], pa.decimal128(20, 2)),
        "half": pa.array([1, 2, None], pa.float32()).cast(pa.float16()),
        **{str(kind): pa.array([1, None, 3], kind) for kind in temporal()},
    }
    table = pa.table(columns)
    for name, new in (("file.arrow", ipc.new_file), ("stream.arrow", ipc.new_stream)):
        with new(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    parquet.write_table(table.drop(["view"]), folder / "table.parquet")
    return [folder / name for name in ("file.arrow", "stream.arrow", "table.parquet")]


def read_mutants(source: Path, count: int) -> None:
    """Read a file with some bytes changed and pieces moved, again and again."""
    good, changed = source.read_bytes(), source.with_name(f"changed{source.suffix}")
    seed = str(random.SystemRandom().getrandbits(64)) if EXAMPLES else source.name
    print("seed", seed, file=sys.stderr, flush=True)  # so that what ended the process can be made again
    generator = random.Random(seed)
    for _ in range(count):
        data = bytearray(good)
        if generator.random() < 0.2:  # a piece is lost, or stands twice, or is another's
            start, size = generator.randrange(len(data)), generator.choice([1, 4, 8, 64, 512])
            put = generator.choice([b"", bytes(size), data[start : start + size] * 2, generator.randbytes(size)])
            data[start : start + size] = put
        for _ in range(generator.choice([0, 1, 1, 2, 5]) if data else 0):
            at = generator.randrange(len(data))
            flipped = data[at] ^ (1 << generator.randrange(8))
            data[at] = generator.choice([0, 255, 127, 128, flipped, generator.randrange(256)])
        changed.write_bytes(data)
        try:
            list(read_source(changed))
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("number", only([1, 2], [0, 1, 2]), ids=["file", "stream", "parquet"])
def test_changed_bytes_are_read_or_refused(tmp_path, number):
    pytest.importorskip("pyarrow")
    path = written(tmp_path)[number]
    # In a process of its own: what this is about would end this one.
    code = "import sys; sys.path[:0] = sys.argv[2:]; from fuzz import test_fuzz_tables as t\n"
    code += "t.read_mutants(t.Path(sys.argv[1]), t.MUTANTS)"
    command = [sys.executable, "-c", code, str(path), str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:100] + done.stderr[-500:]


def test_records_without_values_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather

    feather.write_feather(
        pa.table({"input": pa.nulls(10**9)}), tmp_path / "many.feather", compression="uncompressed"
    )
    with pytest.raises(DataError, match="unpack to more than"):
        list(read_source(tmp_path / "many.feather"))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("columns", [1, 4])
def test_records_are_counted_as_what_they_take_before_they_are_made(tmp_path, form, columns, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    path, rows = tmp_path / f"t.{form}", 1000
    table = pa.table({f"c{number}": pa.array([1] * rows, pa.int8()) for number in range(columns)})
    if form == "parquet":
        parquet.write_table(table, path, compression="zstd")
    else:
        feather.write_feather(table, path, compression="zstd")
    needed = rows * (300 + columns * (100 + 1))
    monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", str(needed))
    assert len(list(read_source(path))) == rows
    monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", str(needed - 1))
    with pytest.raises(DataError, match="unpack to more than"):
        list(read_source(path))


def bombs():
    """Yield tables of little that is much when it is unpacked, by what makes them so."""
    import pyarrow as pa

    text, outputs = "x" * (1 << 20), ["y"] * 80
    indices = pa.array([0] * 80, pa.int32())
    yield "dictionary", {"input": pa.DictionaryArray.from_arrays(indices, pa.array([text])), "output": outputs}
    lists = pa.DictionaryArray.from_arrays(indices, pa.array([[text]]))
    yield "lists", {"input": lists, "output": outputs}
    yield "packed", {"input": [text] * 80, "output": outputs}
    yield "nested", {"messages": [[{"role": "user", "content": text}]] * 80}
    _, views, long = pa.array([text], pa.string_view()).buffers()
    repeated = pa.py_buffer(views.to_pybytes() * 80)
    yield "views", {"input": pa.Array.from_buffers(pa.string_view(), 80, [None, repeated, long]), "output": outputs}
    yield "lists of nothing", {"input": pa.ListArray.from_arrays([0, 10**9], pa.nulls(10**9))}


@pytest.mark.parametrize("kind", ["dictionary", "lists", "packed", "nested", "views", "lists of nothing"])
@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_what_unpacks_to_much_is_refused_before(tmp_path, kind, form, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    if form == "parquet" and kind in ("lists", "views", "lists of nothing"):
        pytest.skip("Parquet has none")
    monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", str(64 << 20))  # where the text itself takes a megabyte
    table, path = pa.table(dict(bombs())[kind]), tmp_path / f"t.{'parquet' if form == 'parquet' else 'arrow'}"
    if form == "parquet":
        parquet.write_table(table, path, compression="zstd")
    else:
        options = ipc.IpcWriteOptions(compression="zstd" if kind in ("packed", "nested") else None)
        with (ipc.new_file if form == "file" else ipc.new_stream)(
            str(path), table.schema, options=options
        ) as writer:
            writer.write_table(table)
    held = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match="unpack to more than 67,108,864"):
        list(read_source(path))
    assert pa.default_memory_pool().max_memory() < held + (16 << 20)


@pytest.mark.parametrize("form", ["table.parquet", "file.arrow", "stream.arrow"])
def test_packed_tables_give_the_records_that_were_written(tmp_path, form):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    columns = {
        "text": pa.array([f"text {number % 7}" for number in range(300)]).dictionary_encode(),
        "numbers": [[number, None] for number in range(300)],
        "messages": [[{"role": "user", "content": f"{number}"}] for number in range(300)],
        "decimal": pa.array(range(300), pa.decimal128(20)),
    }
    table = pa.table(columns).slice(5, 250)
    if form == "table.parquet":
        parquet.write_table(table, tmp_path / form, row_group_size=100, dictionary_pagesize_limit=200)
    else:
        new = ipc.new_file if form == "file.arrow" else ipc.new_stream
        with new(str(tmp_path / form), table.schema, options=ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(table, max_chunksize=100)
    assert [each.record for each in read_source(tmp_path / form)] == table.to_pylist()


@pytest.mark.parametrize("names", ["5", '"ab"', '{"a": 1}', '["x"', "[" * 5000])
def test_names_of_classes_that_are_no_names_are_passed_over(tmp_path, names):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    feature = '{"info": {"features": {"output": {"_type": "ClassLabel", "names": ' + names + "}}}}"
    table = pa.table({"input": ["a"], "output": [0]}).replace_schema_metadata({"huggingface": feature})
    parquet.write_table(table, tmp_path / "table.parquet")
    (found,) = read_source(tmp_path / "table.parquet")
    assert found.record == {"input": "a", "output": 0}


def saved(table, path):
    """Write a table in the form of its suffix."""
    from pyarrow import feather, parquet

    parquet.write_table(table, path) if path.suffix == ".parquet" else feather.write_feather(table, path)
    return path


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["timestamp", "duration", "zone", "date", "list"])
def test_a_time_that_python_has_not_is_an_error_with_its_record(tmp_path, form, kind):
    pa = pytest.importorskip("pyarrow")
    types = {
        "timestamp": pa.timestamp("us"),
        "duration": pa.duration("s"),
        "zone": pa.timestamp("us", "../../x"),
        "date": pa.date64(),
        "list": pa.list_(pa.timestamp("us")),
    }
    values = [1, None, 2**62] if kind != "list" else [[1], None, [2**62]]
    table = pa.table({"input": ["a", "b", "c"], "when": pa.array(values, types[kind])})
    if kind == "date":
        whole = pa.array([86_400_000 * 10**9] * 3).view(pa.date64())
        table = pa.table({"input": ["a", "b", "c"], "when": whole})
    path, first = saved(table, tmp_path / f"t.{form}"), 1 if kind in ("zone", "date") else 3
    with pytest.raises(DataError, match=rf"t\.{form}, record {first}: not a readable \w+ file \("):
        list(read_source(path))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_maps_are_read_and_counted_as_what_they_hold(tmp_path, form, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    kind = pa.map_(pa.string(), pa.list_(pa.string()))
    values = [[(f"key {number}", ["x" * 100]), ("b", None)] if number % 3 else None for number in range(300)]
    table = pa.table({"input": ["a"] * 300, "map": pa.array(values, kind)}).slice(5, 250)
    path = saved(table, tmp_path / f"t.{form}")
    assert [each.record for each in read_source(path)] == table.to_pylist()
    monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", str(250 * 700))
    with pytest.raises(DataError, match="unpack to more than"):
        list(read_source(path))
    monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", str(250 * 1500))
    assert len(list(read_source(path))) == 250


def varint(number, width=1):
    """Return a number of thrift's compact protocol in at least so many bytes."""
    found, number = [], 2 * number
    while number or len(found) < width:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found[:-1], found[-1] & 127])


def lying(data, *truths):
    """Return a Parquet file whose footer says 30 in the place of some numbers."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[start:]
    for truth in truths:
        assert varint(truth) in footer
        footer = footer.replace(varint(truth), varint(30, len(varint(truth))))
    return data[:start] + footer


@pytest.mark.parametrize(
    ("kind", "version"),
    only(
        [("packed", "1.0"), ("packed", "2.0"), ("nested", "2.0"), ("prefixes", "1.0")],
        itertools.product(("packed", "nested", "prefixes"), ("1.0", "2.0")),
    ),
)
def test_a_footer_that_lies_is_not_believed(tmp_path, kind, version, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", str(64 << 20))
    path, how = tmp_path / "t.parquet", {"data_page_version": version, "use_dictionary": False}
    if kind == "prefixes":  # each value is the one before it and nothing more
        table, how = pa.table({"input": ["x" * 100_000] * 2000}), how | {"column_encoding": "DELTA_BYTE_ARRAY"}
    elif kind == "packed":
        table = pa.table({"input": ["x" * (80 << 20)]})
    else:
        table = pa.table({"input": [[1] * 20_000_000]})
    parquet.write_table(table, path, compression="zstd", write_statistics=False, **how)
    if kind != "prefixes":
        group = parquet.read_metadata(path).row_group(0)
        path.write_bytes(lying(path.read_bytes(), group.column(0).total_uncompressed_size))
    held = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match="unpack to more than 67,108,864"):
        list(read_source(path))
    assert pa.default_memory_pool().max_memory() < held + (16 << 20)


def test_rows_without_columns_are_counted(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"a": pa.nulls(10**6)}), path)
    with pytest.raises(DataError, match="unpack to more than"):
        list(read_source(path))


@pytest.mark.parametrize(
    "codec", only(["none", "snappy", "zstd"], ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_what_writers_make_is_read(tmp_path, codec, version, dictionary):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "input": [f"text {number % 50}" * (number % 9) for number in range(3000)],
        "messages": [[{"role": "user", "content": str(number)}] * (number % 3) for number in range(3000)],
        "number": [None if number % 5 else number for number in range(3000)],
        "fixed": pa.array([b"%08d" % number for number in range(3000)], pa.binary(8)),
        "true": [number % 2 == 0 for number in range(3000)],
    }
    how = {"data_page_version": version, "compression": codec, "use_dictionary": dictionary}
    if not dictionary:
        how["column_encoding"] = {"number": "DELTA_BINARY_PACKED"}
        how["column_encoding"]["fixed"] = "BYTE_STREAM_SPLIT"
    table = pa.table(columns)
    how |= {"row_group_size": 1000, "data_page_size": 2000, "dictionary_pagesize_limit": 3000}
    how |= {"write_page_index": True, "write_page_checksum": True, "store_schema": dictionary}
    parquet.write_table(table, tmp_path / "t.parquet", **how)
    assert [each.record for each in read_source(tmp_path / "t.parquet")] == table.to_pylist()


def test_a_table_of_pandas_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"input": ["a", "b"], "output": ["x", None]}, index=["p", "q"])
    frame.to_parquet(tmp_path / "t.parquet")
    found = [each.record for each in read_source(tmp_path / "t.parquet")]
    assert [each["input"] for each in found] == ["a", "b"]
