"""The driver of a batch over a stand-in for Ray in this process, which ends parts in any order and loses some."""

import datetime
import gzip
import json
import sys
from contextvars import Context
from functools import partial

import pytest

from oracles.ray_stand_in import in_place_of_ray
from oracles.slow import only
from softprompt import load
from softprompt.backbone import trust_code
from softprompt.batches import BatchSettings, BatchTask, Parts, run_batch, worker
from softprompt.batches.run import _lines, _listed
from softprompt.cli.main import run
from softprompt.data import read_source
from softprompt.errors import ConfigError, DataError, OutputExistsError, UsageError


@pytest.fixture
def stand_in(monkeypatch):
    return partial(in_place_of_ray, monkeypatch)


@pytest.fixture
def data(tmp_path, texts):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.jsonl").write_text(
            "".join(json.dumps({"input": f"{number} {t}"}) + "\n" for t in texts)
        )
    return folder


def test_answers_stand_in_the_order_of_the_records_and_only_lost_parts_have_errors(
    prompts, texts, data, tmp_path, stand_in
):
    ray = stand_in(lost={21})
    asked = BatchTask("classify", {"complaints": str(prompts / "complaints")})
    out, how = tmp_path / "out", BatchSettings(part_size=5, workers=2)
    found = run_batch(asked, [str(data)], out, how)
    assert found == {"records": 48, "parts": 10, "computed": 10, "errors": 5}
    assert ray.killed == 2
    rows = list(Parts(out, "jsonl").rows())
    assert [row["record"] for row in rows] == list(range(1, 49))
    assert {row["record"] for row in rows if row["error"]} == set(range(21, 26))
    assert "out of memory" in rows[20]["error"]
    expected = load(prompts / "complaints").classify([f"{number} {text}" for number in range(2) for text in texts])
    kept = [i for i in range(48) if not 20 <= i < 25]
    assert [rows[i]["label"] for i in kept] == [expected[i].label for i in kept]

    ray = stand_in()  # what was lost is computed again, and nothing else
    assert run_batch(asked, [str(data)], out, how, resume=True) == found | {"computed": 1, "errors": 0}
    assert ray.calls == 1
    assert [row["label"] for row in Parts(out, "jsonl").rows()] == [each.label for each in expected]
    with pytest.raises(UsageError, match="has part_size 5, not 6"):
        run_batch(asked, [str(data)], out, BatchSettings(part_size=6), resume=True)
    (data / "00.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="has files "):
        run_batch(asked, [str(data)], out, how, resume=True)


@pytest.mark.parametrize("content", [b"{broken", b"[1]", b"\xff\xfe", b"", None])
def test_a_damaged_plan_is_one_clear_line(prompts, data, tmp_path, monkeypatch, content):
    monkeypatch.setitem(sys.modules, "ray", None)  # which would be said where it were started
    plan = tmp_path / "out" / "batch.json"
    plan.parent.mkdir()
    plan.mkdir() if content is None else plan.write_bytes(content)
    asked = BatchTask("generate", {"writer": str(prompts / "writer")})
    with pytest.raises(UsageError, match=r"out/batch\.json.*, or begin anew in another output$"):
        run_batch(asked, [str(data)], tmp_path / "out", resume=True)


@pytest.mark.parametrize("form", only(["parquet"], ["jsonl", "parquet"]))
def test_a_damaged_part_is_named_and_deleting_it_mends_the_batch(prompts, data, tmp_path, stand_in, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    asked = BatchTask("classify", {"complaints": str(prompts / "complaints")})
    out, how = tmp_path / "out", BatchSettings(part_size=24, output_format=form)
    stand_in()
    found = run_batch(asked, [str(data)], out, how)
    part = out / f"part-000001.{form}"
    whole = part.read_bytes()
    for content in (b"", b"{broken\n", b"[1]\n", b'"text"\n', b"{}\n", b"\xff\xfe\n", whole[:-9]):
        part.write_bytes(content)
        with pytest.raises(DataError, match=rf"{part.name}, it cannot be read .*; delete it, and --resume"):
            run_batch(asked, [str(data)], out, how, resume=True)
    part.unlink()
    assert run_batch(asked, [str(data)], out, how, resume=True) == found | {"computed": 1}
    assert part.read_bytes() == whole


def test_more_workers_than_gpus_are_refused(prompts, data, tmp_path, stand_in):
    ray = stand_in(gpus=1)
    asked = BatchTask("generate", {"writer": str(prompts / "writer")})
    with pytest.raises(ConfigError, match="--workers 2: each takes a GPU, and the cluster has 1"):
        run_batch(asked, [str(data)], tmp_path / "out", BatchSettings(workers=2))
    assert ray.made == 0


def test_a_cluster_without_a_cpu_to_read_with_is_told(prompts, data, tmp_path, stand_in, caplog):
    asked = BatchTask("generate", {"writer": str(prompts / "writer")}, options={"max_new_tokens": 1})
    for workers, told in ((1, []), (2, ["workers and reading need 3 CPUs, Ray has 2 and waits for more"])):
        stand_in()
        caplog.clear()
        run_batch(asked, [str(data)], tmp_path / str(workers), BatchSettings(workers=workers))
        assert [each.getMessage() for each in caplog.records if each.name == "softprompt.cluster"] == told


def test_workers_trust_code_where_the_command_does(data, tmp_path, stand_in, monkeypatch):
    stand_in()
    told = []

    def loaded(prompts, **reading):
        told.append(reading["trust_remote_code"])
        raise ConfigError("enough")

    def begun(trust):
        trust()
        run_batch(BatchTask("generate", {"a": "a"}), [str(data)], tmp_path / trust.__name__)

    monkeypatch.setattr(worker, "load_many", loaded)
    for trust in (bool, trust_code):
        with pytest.raises(ConfigError, match="enough"):
            Context().run(begun, trust)
    assert told == [False, True]


def test_what_cannot_be_read_or_has_no_ray_is_refused(prompts, data, tmp_path, stand_in, monkeypatch):
    asked = BatchTask("generate", {"writer": str(prompts / "writer")})
    stand_in()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"^notes\.txt: expected one of the suffixes"):
        run_batch(asked, [str(tmp_path / "notes.txt")], tmp_path / "out")
    with pytest.raises(DataError, match="expected data files in the folder"):
        (tmp_path / "none").mkdir()
        run_batch(asked, [str(tmp_path / "none")], tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        run_batch(asked, [str(tmp_path / "absent")], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'softprompt\[ray\]'"):
        run_batch(asked, [str(data)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_text_format_is_read_as_without_ray(prompts, tmp_path, stand_in):
    texts = ["The kettle, broke.", "007", "true"]
    records = [{"input": text, "output": "x"} for text in texts]
    files = {
        "list.json": json.dumps(records, indent=1),
        "semicolons.csv": "input;output\n" + "".join(f"{text};x\n" for text in texts),
        "tabs.tsv": "input\toutput\n" + "".join(f"{text}\tx\n" for text in texts),
        "packed.jsonl.gz": "\n\n".join(map(json.dumps, records)),
    }
    ray = stand_in()
    for name, text in files.items():
        raw, path = text.encode("utf-8-sig" if name.endswith("csv") else "utf-8"), tmp_path / name
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        read = [json.loads(line) for part in _lines(ray, _listed([str(path)]), 2) for line in part]
        assert read == [dict(each.record) for each in read_source(path)] == records, name
    (tmp_path / "a").mkdir()
    for name, blank in (("1", b""), ("2", b"\xef\xbb\xbf \n"), ("3", b'{"input": "x"}\n')):
        (tmp_path / "a" / f"{name}.jsonl").write_bytes(blank)
    assert list(_lines(ray, _listed([str(tmp_path / "a")]), 2)) == [['{"input": "x"}']]


def test_tables_are_read_as_without_ray_and_beside_texts(prompts, texts, tmp_path, stand_in):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    names = '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["late", "broken"]}}}}'
    table = pa.table({"input": texts[:4], "label": [0, 1, 1, 0], "at": [datetime.date(2026, 1, 1)] * 4})
    table = table.replace_schema_metadata({"huggingface": names})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    feather.write_feather(table, tmp_path / "b.feather")
    (tmp_path / "c.csv").write_text("input,label\nx,late\n")
    (tmp_path / "notes.txt").write_text("which is passed over")
    read = [json.loads(line) for part in _lines(stand_in(), _listed([str(tmp_path)]), 3) for line in part]
    labels = ["late", "broken", "broken", "late"]
    own = [{"input": text, "label": label} for text, label in zip(texts, labels, strict=False)]
    assert [{name: each[name] for name in ("input", "label")} for each in read] == [
        *own,
        *own,
        {"input": "x", "label": "late"},
    ]
    assert read[0]["at"] == ["2026-01-01"]  # a list, which is left out of the fields as a date is


@pytest.mark.parametrize(
    "name",
    only(["bomb.parquet"], ["bomb.jsonl.gz", "bomb.csv.zst", "bomb.parquet", "bomb.feather"]),
)
def test_what_unpacks_to_much_is_refused_as_without_ray(prompts, tmp_path, stand_in, monkeypatch, name):
    pa, zstandard = pytest.importorskip("pyarrow"), pytest.importorskip("zstandard")
    from pyarrow import feather, parquet

    stand_in()
    path, record = tmp_path / name, b'{"input": "%s"}\n'
    columns = pa.table({"input": ["x" * (1 << 20)] * 80})
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(record % (b"x" * (80 << 20))))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(b"input\n" + b"x" * (80 << 20)))
    elif name.endswith(".parquet"):
        parquet.write_table(columns, path)
    else:
        feather.write_feather(columns, path, compression="zstd")
    asked = BatchTask("classify", {"complaints": str(prompts / "complaints")})
    with pytest.raises(DataError, match=r"unpack to more than 67,108,864.*SOFTPROMPT_MAX_UNPACKED_BYTES") as plain:
        list(read_source(path))
    with pytest.raises(DataError) as found:
        run_batch(asked, [str(path)], tmp_path / "out")
    assert str(found.value) == str(plain.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("SOFTPROMPT_MAX_UNPACKED_BYTES", str(1 << 30))
    assert sum(map(len, _lines(stand_in(), _listed([str(path)]), 100))) in (1, 80)


def test_a_batch_that_cannot_begin_leaves_nothing_and_is_not_begun(prompts, tmp_path, stand_in):
    asked = BatchTask("evaluate", {"complaints": str(prompts / "complaints")})
    stand_in()
    (tmp_path / "1.jsonl").write_bytes(b"")
    (tmp_path / "2.jsonl").write_bytes(b"\n")
    (tmp_path / "broken.json").write_text('{"input": "x"}')
    for name, said in (
        ("1.jsonl", r"1.jsonl: the file is empty"),
        ("2.jsonl", "expected at least one record"),
        ("broken.json", r"^broken.json, line 1: expected a JSON list"),
        ("absent.jsonl", "does not exist"),
    ):
        with pytest.raises(DataError, match=said):
            run_batch(asked, [str(tmp_path / name)], tmp_path / "out")
        assert not (tmp_path / "out").exists(), name
    with pytest.raises(UsageError, match="is in the data"):
        run_batch(asked, [str(tmp_path)], tmp_path / "out")


def test_what_is_wrong_with_the_output_is_said_before_ray_starts(prompts, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # which would be said where it were started
    asked = BatchTask("generate", {"writer": str(prompts / "writer")})
    with pytest.raises(UsageError, match="nothing to resume"):
        run_batch(asked, [str(data)], tmp_path / "out", resume=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="name another output"):
        run_batch(asked, [str(data)], tmp_path / "out")


def test_errors_of_records_are_told_and_those_of_all_end_it(prompts, tmp_path, stand_in, caplog):
    asked = BatchTask("classify", {"complaints": str(prompts / "complaints")})
    (tmp_path / "in.jsonl").write_text('{"input": "x"}\n{"inputs": "y"}\n')
    stand_in()
    found = run_batch(asked, [str(tmp_path / "in.jsonl")], tmp_path / "out")
    assert found["errors"] == 1
    assert [each.getMessage() for each in caplog.records if each.name == "softprompt.batches.run"] == [
        "1 of 2 records have errors; record 2: the template expects the fields input, got inputs; add input"
    ]
    asked = BatchTask("classify", {"complaints": str(prompts / "complaints")}, columns={"input_field": "nope"})
    with pytest.raises(DataError, match="no record has an answer; record 1: expected the field 'nope'"):
        run_batch(asked, [str(tmp_path / "in.jsonl")], tmp_path / "none")


def test_ctrl_c_says_how_to_go_on_and_what_is_finished_stays(prompts, data, tmp_path, stand_in, capsys):
    words = [
        "classify",
        str(prompts / "complaints"),
        "--ray",
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
    ]
    words += ["--part-size", "5", "--workers", "1"]
    ray = stand_in()
    wait, waits = ray.wait, []

    def interrupted(refs, num_returns):
        waits.append(refs)
        if len(waits) > 3:
            raise KeyboardInterrupt
        return wait(refs, num_returns)

    ray.wait = interrupted
    assert run(words) == 130
    said = capsys.readouterr().err.splitlines()
    assert f"warning: what is finished stays in {tmp_path / 'out'}; --resume goes on with it" in said
    assert said[-1] == "interrupted"
    assert ray.killed == 1
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(kept) == 4
    ray = stand_in()
    assert run([*words, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(tmp_path / "out"),
        "records": 48,
        "parts": 10,
        "computed": 7,
        "errors": 0,
    }
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_command_evaluates_as_without_ray(prompts, texts, tmp_path, stand_in, capsys):
    stand_in()
    labels = ["complaint", "no complaint"]
    records = [{"input": text, "output": labels[i % 2]} for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    words = ["evaluate", str(prompts / "complaints"), "--data", str(tmp_path / "in.jsonl"), "--json"]
    assert run(words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run([*words, "--ray", "--output", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(plain["accuracy"])
