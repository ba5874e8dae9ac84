from __future__ import annotations

import builtins
import csv
import gzip
import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data import Record, read_records, read_source
from softprompt.data.file_formats import SUFFIXES, TEXT_READERS
from softprompt.errors import DataError

ROWS = [
    {"input": 'the "quoted", parcel', "output": "complaint"},
    {"input": "naïve ☕", "output": "no complaint"},
]
EXAMPLES = [Record({"input": row["input"]}, row["output"]) for row in ROWS]


def refused(path, match):
    with pytest.raises(DataError, match=match) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def as_bytes(suffix):
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if suffix == ".json":
        return json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
    if suffix == ".csv":
        return 'input,output\n"the ""quoted"", parcel",complaint\nnaïve ☕,no complaint\n'.encode()
    if suffix == ".tsv":
        return 'input\toutput\nthe "quoted", parcel\tcomplaint\nnaïve ☕\tno complaint\n'.encode()
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    table, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    if suffix == ".parquet":
        parquet.write_table(table, sink)
    elif suffix == ".feather":
        feather.write_feather(table, sink)
    else:
        with ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


class TestEveryFormat:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_reads_the_same_examples(self, written, suffix):
        path = written(f"train{suffix}", as_bytes(suffix))
        assert read_records(path) == EXAMPLES
        assert read_records(str(path)) == EXAMPLES
        assert read_records(written(f"upper{suffix.upper()}", as_bytes(suffix))) == EXAMPLES

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
    def test_byte_order_mark_and_windows_line_ends(self, written, suffix):
        content = b"\xef\xbb\xbf" + as_bytes(suffix).replace(b"\n", b"\r\n")
        assert read_records(written(f"train{suffix}", content)) == EXAMPLES

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
    def test_bytes_that_are_not_utf8(self, written, suffix):
        content = as_bytes(suffix)
        row = content.index("ï".encode())
        line = content.count(b"\n", 0, row) + 1
        path = written(f"train{suffix}", content.replace("ï".encode(), b"\xef"))
        refused(path, rf"train{suffix}, line {line}: not UTF-8 \(byte 0xef\)")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_an_empty_file(self, written, suffix):
        refused(written(f"train{suffix}", b""), "the file is empty")

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
    def test_a_blank_file(self, written, suffix):
        refused(written(f"train{suffix}", b" \n\n"), "the file is empty")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_truncated_file_never_gives_a_raw_error(self, written, suffix):
        content = as_bytes(suffix)
        for end in range(0, len(content), 7):
            try:
                read_records(written(f"train{suffix}", content[:end]))
            except DataError as error:
                assert "\n" not in str(error)


class TestPaths:
    def test_missing(self, tmp_path, written):
        written("train.jsonl", "{}")
        refused(tmp_path / "trian.jsonl", "no such data file .did you mean 'train.jsonl'")
        refused(tmp_path / "nowhere" / "train.jsonl", "no such data file$")

    def test_directory(self, tmp_path):
        refused(tmp_path, "got a directory")

    def test_unknown_suffix(self, written):
        known = ", ".join(SUFFIXES)
        refused(written("train.jsnl", "x"), f"expected one of the suffixes {known}, got '.jsnl'.*jsonl")
        refused(written("train", "x"), "got 'none'")


class TestJsonLines:
    def test_a_malformed_line_has_its_number(self, written):
        text = '{"input": "a", "output": "b"}\n\n{"input": "a" "output": "b"}\n'
        refused(written("t.jsonl", text), r"t.jsonl, line 3: not valid JSON \(Expecting ',' .*column 15")

    @pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ('"late"', "text 'late'"), ("null", "None")])
    def test_a_line_that_is_no_object(self, written, line, kind):
        refused(written("t.jsonl", f'{{"input": "a", "output": "b"}}\n{line}'), f"line 2: .*{kind}")

    def test_a_repeated_field(self, written):
        refused(written("t.jsonl", '{"input": "a", "input": "b"}'), "line 1: .*'input' occurs twice")

    def test_a_missing_field_has_its_line(self, written):
        text = '{"input": "a", "output": "b"}\n{"input": "a", "ouput": "b"}\n'
        refused(written("t.jsonl", text), "t.jsonl, line 2: .*'output', got input, ouput .did you")

    def test_nesting_beyond_measure(self, written):
        refused(written("t.jsonl", "[" * 200_000), "line 1: .*nested too deeply|line 1: not valid")

    def test_unicode_line_separators_stay_inside_a_value(self, written):
        row = {"input": "a\u2028b\u0085c", "output": "x"}
        path = written("t.jsonl", json.dumps(row, ensure_ascii=False))
        assert read_records(path)[0].fields["input"] == row["input"]


class TestJsonList:
    def test_records_have_the_line_where_they_begin(self, written):
        text = '[\n {"input": "a",\n "output": "b"},\n\n 3]'
        refused(written("t.json", text), "t.json, line 5: .*type int")
        refused(written("t.json", '[\n{"input": "a", "output": "b"},\n{"x": "y"}]'), "line 3: .*got x")

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ('{"a": "b"}', "line 1: expected a JSON list.*jsonl, got '{"),
            ('[\n{"a": }]', "line 2: not valid JSON"),
            ('[{"a": 1}\n{"a": 2}]', "line 2: expected ',' or ']'"),
            ('[{"a": 1},\n]', "line 2: not valid JSON"),
            ('[{"a": 1}', "line 1: expected ',' or ']'"),
            ('[{"input": 1, "output": 1}]\n\nmore', "line 3: expected the end.*'more'"),
            ("[]", "at least one record, got none"),
            ('[{"a": 1, "a": 2}]', "'a' occurs twice"),
        ],
    )
    def test_refused(self, written, text, match):
        path = written("t.json", text)
        with pytest.raises(DataError, match=match):
            list(read_source(path))

    @settings(suppress_health_check=list(HealthCheck))
    @given(
        rows=st.lists(st.dictionaries(st.text(), st.text() | st.integers()), min_size=1),
        indent=st.sampled_from([None, 2]),
    )
    def test_agrees_with_the_json_module(self, written, rows, indent):
        path = written("t.json", json.dumps(rows, indent=indent))
        assert [located.record for located in read_source(path)] == rows


class TestTables:
    def test_csv_values_may_hold_line_ends(self, written):
        text = 'input,output\n"a\nb",x\n\n"c"\n'
        refused(written("t.csv", text), r"t.csv, line 5: expected 2 fields \(input, output\), got 1")
        assert read_records(written("t.csv", text[:-4]))[0].fields["input"] == "a\nb"

    @pytest.mark.parametrize("row", ['"a"b,x', '"a,x\n'])
    def test_csv_quotes_that_do_not_close(self, written, row):
        refused(written("t.csv", f"input,output\na,x\n{row}"), "line 3: not valid CSV")

    def test_tsv_quotes_are_ordinary(self, written):
        path = written("t.tsv", 'input\toutput\n"a\tx\nit \'s "b"\ty\n')
        assert [e.fields["input"] for e in read_records(path)] == ['"a', 'it \'s "b"']

    @pytest.mark.parametrize(("suffix", "tab"), [(".csv", ","), (".tsv", "\t")])
    def test_rows_and_headers(self, written, suffix, tab):
        def text(*rows):
            return "\n".join(tab.join(row) for row in rows)

        head = ("input", "output")
        name = f"t{suffix}"
        refused(written(name, text(head, ("a", "b", "c"))), "line 2: expected 2 fields .*, got 3")
        refused(written(name, text(head)), "at least one record, got none")
        refused(written(name, text(("input", "input"), ("a", "b"))), "names 'input' twice")
        refused(written(name, text(("input", ""), ("a", "b"))), "column 2 of the header has no name")
        refused(written(name, text(head, ("a", ""))), "line 2: expected a value in .*'output', got ''")


class TestColumnFiles:
    @pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
    def test_a_damaged_file(self, written, suffix):
        pytest.importorskip("pyarrow")
        refused(written(f"t{suffix}", b"ARROW1 and nothing more"), "not a readable")
        refused(written(f"t{suffix}", b"nothing at all"), "not a readable")

    @pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
    def test_without_pyarrow_the_extra_is_named(self, written, suffix, monkeypatch):
        path, real = written(f"t{suffix}", b"x"), builtins.__import__

        def without_pyarrow(name, *args, **kwargs):
            if name.split(".")[0] == "pyarrow":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_pyarrow)
        refused(path, r'pip install "softprompt\[data\]"')

    def test_an_arrow_file_whose_index_has_more_than_its_stream(self, written):
        pyarrow = pytest.importorskip("pyarrow")
        batch = pyarrow.RecordBatch.from_pylist(ROWS)
        whole, one = pyarrow.BufferOutputStream(), pyarrow.BufferOutputStream()
        for sink, make, count in ((whole, pyarrow.ipc.new_file, 2), (one, pyarrow.ipc.new_stream, 1)):
            with make(sink, batch.schema) as writer:
                for _ in range(count):
                    writer.write_batch(batch)
        data, end = bytearray(whole.getvalue().to_pybytes()), b"\xff\xff\xff\xff\0\0\0\0"
        assert read_records(written("t.arrow", bytes(data))) == EXAMPLES * 2
        at = 8 + one.getvalue().size - len(end)
        data[at : at + len(end)] = end
        refused(written("t.arrow", bytes(data)), r"not a readable Arrow file \(expected 2 batches, got 1\)")

    def test_offsets_that_point_outside_their_values(self, written):
        pyarrow = pytest.importorskip("pyarrow")
        sink, table = pyarrow.BufferOutputStream(), pyarrow.table({"input": ["late", "never"]})
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data, offsets = sink.getvalue().to_pybytes(), struct.pack("<iii", 0, 4, 9)
        assert data.count(offsets) == 1
        wrong = data.replace(offsets, struct.pack("<iii", 0, 4, 900))
        refused(written("t.arrow", wrong), "t.arrow: not a readable Arrow file")

    @pytest.mark.parametrize("form", ["run_end_encoded", "list_view"])
    def test_columns_that_may_hold_more_than_they_have_are_refused(self, written, form):
        pyarrow = pytest.importorskip("pyarrow")
        if form == "list_view":
            column = pyarrow.array([["a"], ["b"]], pyarrow.list_view(pyarrow.string()))
        else:
            column = pyarrow.RunEndEncodedArray.from_arrays([1, 2], ["a", "b"])
        sink, table = pyarrow.BufferOutputStream(), pyarrow.table({"input": column})
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        refused(
            written("t.arrow", sink.getvalue().to_pybytes()), f"columns of type {form}<.* are not read; store lists"
        )

    def test_a_column_of_an_extension_type_is_what_it_stores(self, written):
        pyarrow = pytest.importorskip("pyarrow")
        texts = [json.dumps(row["input"]) for row in ROWS]
        column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts))
        sink = pyarrow.BufferOutputStream()
        table = pyarrow.table({"input": column, "output": [row["output"] for row in ROWS]})
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        found = read_records(written("t.arrow", sink.getvalue().to_pybytes()))
        assert [each.fields["input"] for each in found] == texts

    def test_nulls_and_numbers(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{"input": "a", "output": 1}, {"input": "b", "output": None}]
        parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "good.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "null.parquet")
        assert read_records(tmp_path / "good.parquet")[0].target == "1"
        refused(tmp_path / "null.parquet", "null.parquet, record 2: .*'output', got None")

    def test_the_names_of_class_ids_that_datasets_wrote_beside_them(self, tmp_path, classes):
        classes.to_parquet(tmp_path / "t.parquet")
        assert [each.target for each in read_records(tmp_path / "t.parquet", **LABEL)] == ["neg", "pos"]


LABEL = {"output_field": "label"}


@pytest.fixture(scope="module")
def classes():
    datasets = pytest.importorskip("datasets")
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    features["labels"] = datasets.List(datasets.ClassLabel(names=["late", "broken"]))
    columns = {"text": ["a", "b"], "label": [0, 1], "labels": [[0], [1, 0]]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


class TestDatasets:
    def test_class_ids_get_their_names(self, classes):
        assert [each.target for each in read_records(classes, **LABEL)] == ["neg", "pos"]
        assert [each.target for each in read_records(classes, output_field="labels")] == ["late", "broken,late"]
        assert [each.target for each in read_records(classes.to_iterable_dataset(), **LABEL)] == ["neg", "pos"]

    def test_no_label_is_no_target(self, classes):
        for none in (-1, None):
            unlabelled = classes.map(lambda row, none=none: {"label": none})
            with pytest.raises(DataError, match="record 1: expected a value in the field 'label', got None"):
                read_records(unlabelled, **LABEL)

    @pytest.mark.parametrize(
        ("names", "use", "read"),
        [
            (["train", "validation", "test"], "train", 0),
            (["train", "validation", "test"], "validation", 1),
            (["train", "validation", "test"], "test", 2),
            (["train", "dev"], "test", 1),
            (["default"], "train", 0),
            (["default"], None, 0),
        ],
    )
    def test_a_dict_gives_the_split_of_its_use(self, classes, names, use, read, caplog):
        datasets = pytest.importorskip("datasets")
        splits = {name: classes.map(lambda row, n=n: {"text": str(n)}) for n, name in enumerate(names)}
        with caplog.at_level("INFO", "softprompt"):
            found = read_records(datasets.DatasetDict(splits), use=use, **LABEL)
        assert {each.fields["text"] for each in found} == {str(read)}
        said = f"of the splits {', '.join(names)}, {names[read]} is read"
        assert [said] * (len(names) > 1) == caplog.messages

    @pytest.mark.parametrize(
        ("names", "use"), [(["train", "test"], None), (["train"], "test"), (["a", "b"], "train")]
    )
    def test_an_open_choice_of_split_is_refused(self, classes, names, use):
        datasets = pytest.importorskip("datasets")
        with pytest.raises(DataError, match=f"among the splits {', '.join(names)}; pass one"):
            read_records(datasets.DatasetDict(dict.fromkeys(names, classes)), use=use, **LABEL)


class TestTablesInMemory:
    def test_pandas(self):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"features": ["a", "b"], "n": [1, None], "output": pandas.Categorical(["x", "y"])})
        frame["n"] = frame["n"].astype("Int64")
        found = read_records(frame, input_field="features")
        assert [each.target for each in found] == ["x", "y"]
        assert [each.fields.get("n") for each in found] == ["1", None]
        twice = pandas.concat([frame, frame], axis=1)
        with pytest.raises(DataError, match="has a column twice"):
            read_records(twice, input_field="features")

    def test_pyarrow(self):
        pyarrow = pytest.importorskip("pyarrow")
        assert read_records(pyarrow.Table.from_pylist(ROWS)) == EXAMPLES


class TestPacked:
    @pytest.mark.parametrize("suffix", TEXT_READERS)
    @pytest.mark.parametrize("packed", [".gz", ".zst"])
    def test_every_text_format(self, written, suffix, packed):
        path = written(f"train{suffix}{packed}", pack(packed, as_bytes(suffix)))
        assert read_records(path) == EXAMPLES
        refused(written(f"train{suffix}{packed}", b"junk"), f"train{suffix}{packed}: not a readable")

    @pytest.mark.parametrize("packed", [".gz", ".zst"])
    def test_a_file_that_ends_too_early_or_goes_on(self, written, packed):
        whole = pack(packed, as_bytes(".jsonl"))
        refused(written(f"t.jsonl{packed}", whole[:-3]), f"t.jsonl{packed}: not a readable")
        assert read_records(written(f"t.jsonl{packed}", whole * 2)) == EXAMPLES * 2

    @pytest.mark.parametrize("packed", [".gz", ".zst"])
    def test_a_small_file_is_not_unpacked_without_end(self, written, packed, monkeypatch):
        bomb = written(f"t.jsonl{packed}", pack(packed, b'{"input": "%s", "output": "x"}' % (b"x" * (65 << 20))))
        refused(
            bomb, f"t.jsonl{packed}: its .* bytes unpack to more than 67,108,864.*SOFTPROMPT_MAX_UNPACKED_BYTES"
        )
        usual = pack(packed, as_bytes(".jsonl") * 2000)
        assert len(read_records(written(f"u.jsonl{packed}", usual))) == 4000
        monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", "100000")
        refused(written(f"u.jsonl{packed}", usual), "unpack to more than 100,000")

    def test_without_zstandard_the_extra_is_named(self, written, monkeypatch):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        refused(
            written("t.jsonl.zst", b"x"), r'reading t.jsonl.zst needs zstandard: pip install "softprompt\[data\]"'
        )

    def test_only_text_is_packed(self, written):
        refused(written("t.parquet.gz", b"x"), r"got '.parquet.gz'.*those of text may have .gz or .zst behind them")


def pack(suffix, data):
    if suffix == ".gz":
        return gzip.compress(data)
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


class TestCsvOfOthers:
    @pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs")])
    def test_the_separator_is_found_and_said(self, written, separator, word, caplog):
        text = f'input{separator}output\n"a, b{separator} c"{separator}x\nd, e{separator}y\n'
        with caplog.at_level("INFO", "softprompt"):
            found = read_records(written("t.csv", text))
        assert [each.fields["input"] for each in found] == [f"a, b{separator} c", "d, e"]
        assert caplog.messages == [f"t.csv: columns are separated by {word}, not by commas"]

    def test_commas_come_first(self, written, caplog):
        with caplog.at_level("INFO", "softprompt"):
            assert read_records(written("t.csv", "input,output\na;b,x\n"))[0].fields["input"] == "a;b"
            assert (
                read_records(written("one.csv", "input\na;b\n"), require_target=False)[0].fields["input"] == "a;b"
            )
        assert caplog.messages == []

    def test_a_cell_longer_than_pythons_limit(self, written):
        before = csv.field_size_limit()
        long = "word " * 40_000
        assert read_records(written("t.csv", f'input,output\n"{long}",x\n'))[0].fields["input"] == long
        assert csv.field_size_limit() == before


class TestStandardInput:
    @pytest.mark.parametrize("suffix", TEXT_READERS)
    def test_its_first_character_tells_the_format(self, monkeypatch, suffix):
        text = as_bytes(suffix) if suffix != ".tsv" else b"input\toutput\nx\ty\n"
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert read_records("-") == (EXAMPLES if suffix != ".tsv" else [Record({"input": "x"}, "y")])

    def test_errors_name_the_line(self, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"input": "a", "output": "b"}\n{"x": 1}\n')))
        refused("-", "standard input, line 2: expected the field 'input'")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        refused("-", "standard input: the file is empty")

    def test_a_terminal_is_not_waited_for(self, monkeypatch):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
        refused("-", "no data on standard input; pipe it in, or name a file instead of -")


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch, classes, tmp_path):
        """A Hub that has one data set, and says what it was asked for."""
        datasets, asked = pytest.importorskip("datasets"), []

        def info(self, name, **options):
            if name not in ("org/set", "glue"):
                raise OSError(f"{name} is not there.\nTry again")

        def load(name, config=None, *, split=None):
            asked.append((name, config, split))
            whole = datasets.DatasetDict(train=classes, validation=classes.select([0]))
            return whole if split is None else whole[split]

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
        monkeypatch.setattr("datasets.load_dataset", load)
        monkeypatch.chdir(tmp_path)
        return asked

    @pytest.mark.parametrize(
        ("name", "asked", "count"),
        [
            ("org/set", ("org/set", None, None), 2),
            ("org/set:validation", ("org/set", None, "validation"), 1),
            ("glue:sst2:validation", ("glue", "sst2", "validation"), 1),
            ("glue:sst2:", ("glue", "sst2", None), 2),
            ("hf://datasets/org/set", ("org/set", None, None), 2),
        ],
    )
    def test_a_name_that_is_no_file_here(self, hub, name, asked, count, caplog):
        with caplog.at_level("INFO", "softprompt"):
            found = read_records(name, use="train", **LABEL)
        assert hub == [asked]
        assert [each.target for each in found] == ["neg", "pos"][:count]
        assert (
            caplog.messages[0] == f"no file {name} here: reading the data set {asked[0]} from the Hugging Face Hub"
        )

    def test_a_file_wins(self, hub, tmp_path):
        (tmp_path / "org").mkdir()
        (tmp_path / "org" / "set").write_text("x")
        refused("org/set", "expected one of the suffixes")
        assert hub == []

    @pytest.mark.parametrize(
        "word", ["trian.jsonl", "data/trian", "set", "./org/set", "org/set.csv", "a/b/c", "org/s.csv:x"]
    )
    def test_a_mistyped_file_is_none(self, hub, tmp_path, word):
        (tmp_path / "data").mkdir()
        refused(word, f"^{Path(word)}: no such data file")
        assert hub == []

    def test_what_is_not_there_is_one_line(self, hub):
        refused(
            "org/other",
            r"no file org/other here, and the data set org/other cannot .* \(org/other is not there\); ch",
        )
        assert hub == []

    def test_without_datasets_the_extra_is_named(self, hub, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        refused("org/set", r'pip install "softprompt\[data\]"')

    def test_without_a_network_the_real_one_is_one_line_too(self):
        pytest.importorskip("datasets")
        refused(
            "no-such-org/no-such-set",
            "no file no-such-org/no-such-set here, and .* check the name .* and the network",
        )
