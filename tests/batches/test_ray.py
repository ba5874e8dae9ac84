"""Batches on a local Ray with two workers, one of which is killed; slow, and skipped where Ray is not installed."""

import gzip
import json
import logging
import threading
import time

import pytest
import torch

from softprompt import load, sweep
from softprompt.batches import BatchSettings, BatchTask, Parts, prompts_in, run_batch
from softprompt.batches.run import _lines, _listed
from softprompt.cli.main import run
from softprompt.errors import ConfigError, DataError

ray = pytest.importorskip("ray", reason="Ray is too heavy for the dev extra")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def data(tmp_path, texts):
    """A folder of three files, 72 records, one of them broken."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        lines = [json.dumps({"input": f"{number} {text}", "which": "writer"}) for text in texts]
        if number == 1:
            lines[5] = "{broken"
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def spoken():
    """What Ray Data says."""
    said, listener = [], logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ray.data").addHandler(listener)
    yield said
    logging.getLogger("ray.data").removeHandler(listener)


def workers(kind="BatchWorker"):
    return [
        each
        for each in psutil.process_iter(["cmdline"])
        if each.info["cmdline"] and each.info["cmdline"][0].startswith(f"ray::{kind}")
    ]


def test_a_killed_worker_loses_nothing_and_nothing_comes_twice(prompts, texts, data, tmp_path):
    asked = BatchTask("generate", {"writer": str(prompts / "writer")}, options={"max_new_tokens": 16})
    out, killed = tmp_path / "out", []

    def kill():
        while not killed:
            if any(out.glob("part-*")):
                for each in workers()[:1]:
                    each.kill()
                    killed.append(each.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = run_batch(asked, [str(data)], out, BatchSettings(part_size=4, workers=2))
    thread.join(timeout=10)
    assert killed
    assert found == {"records": 72, "parts": 18, "computed": 18, "errors": 1}
    rows = list(Parts(out, "jsonl").rows())
    assert [row["record"] for row in rows] == list(range(1, 73))
    assert rows[29]["error"].startswith("record 30: not valid JSON")
    inputs = [f"{number} {text}" for number in range(3) for text in texts]
    expected = load(prompts / "writer").generate(inputs, max_new_tokens=16)
    kept = [i for i in range(72) if i != 29]
    assert [rows[i]["text"] for i in kept] == [expected[i].text for i in kept]

    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for number in (3, 17):
        (out / f"part-{number:06d}.jsonl").unlink()
    again = run_batch(asked, [str(data)], out, BatchSettings(part_size=4, workers=1), resume=True)
    assert again == found | {"computed": 2}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_sweep_is_that_without_ray_and_a_killed_worker_trains_again(texts, tmp_path):
    records = [{"input": text, "output": ("late", "broken")[i % 2]} for i, text in enumerate(texts)]
    settings = {"max_steps": 8, "batch_size": 4, "silence_progress_bars": True}
    space = {"learning_rates": ["x0.3", "x1"], "lengths": ["2", "3"], "eta": 2}
    given = ("demo", records[:16], records[16:])
    straight = sweep(*given, output=tmp_path / "straight", space=space, **settings)
    killed = []

    def kill():
        while not killed:
            for each in workers("RungWorker.train")[:1]:
                time.sleep(0.5)
                each.kill()
                killed.append(each.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = sweep(*given, output=tmp_path / "ray", space=space, ray="auto", workers=2, **settings)
    thread.join(timeout=10)
    assert killed
    assert found.rungs == straight.rungs
    assert [each.name for each in found.candidates] == [each.name for each in straight.candidates]
    torch.testing.assert_close(found.prompt.prompt().input, straight.prompt.prompt().input, rtol=0, atol=1e-5)


def test_lists_tables_and_packed_lines_are_read_as_without_ray(tmp_path):
    records = [{"input": text, "output": "x"} for text in ("The kettle, broke.", "007", "true")] * 50
    packed = gzip.compress("\n".join(map(json.dumps, records)).encode())
    files = {"list.json": json.dumps(records).encode(), "packed.jsonl.gz": packed}
    files["semicolons.csv"] = ("input;output\n" + "".join(f"{each['input']};x\n" for each in records)).encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        read = [json.loads(line) for part in _lines(ray, _listed([str(tmp_path / name)]), 40) for line in part]
        assert read == records, name
    (tmp_path / "broken.json").write_text('{"input": "x"}')
    with pytest.raises(DataError, match=r"^broken.json, line 1: expected a JSON list"):
        list(_lines(ray, _listed([str(tmp_path / "broken.json")]), 40))


def test_the_command_classifies_a_parquet_by_column_and_writes_parquet(prompts, texts, tmp_path, capsys, spoken):
    import pyarrow
    from pyarrow import parquet

    table = {"text": texts, "which": ["complaints"] * len(texts)}
    parquet.write_table(pyarrow.table(table), tmp_path / "in.parquet")
    words = ["classify", str(prompts), "--ray", "--data", str(tmp_path / "in.parquet"), "--prompt-column", "which"]
    words += ["--output", str(tmp_path / "out"), "--output-format", "parquet", "--part-size", "10", "--json"]
    assert run(words) == 0
    # Before the answer Ray may say here that an earlier test's worker has died.
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == len(texts)
    rows = list(Parts(tmp_path / "out", "parquet").rows())
    expected = load(prompts / "complaints").classify(texts)
    assert [row["label"] for row in rows] == [each.label for each in expected]
    assert rows[3]["probabilities"] == pytest.approx(expected[3].probabilities, abs=1e-5)
    assert parquet.read_table(tmp_path / "out" / "part-000000.parquet").column("error").null_count == 10
    assert not spoken  # Ray Data tells each step of reading, unless told not to


def test_evaluate_measures_as_it_does_without_ray(prompts, texts, tmp_path, capsys):
    data = tmp_path / "in.csv"
    labels = ["complaint", "no complaint"]
    data.write_text("input,output\n" + "".join(f"{text},{labels[i % 2]}\n" for i, text in enumerate(texts)))
    words = ["evaluate", str(prompts / "complaints"), "--data", str(data), "--json"]
    assert run(words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run([*words, "--ray", "--output", str(tmp_path / "out"), "--part-size", "7"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: found[name] for name in ("accuracy", "macro_f1")} == pytest.approx(
        {name: plain[name] for name in ("accuracy", "macro_f1")}
    )


def test_what_cannot_be_loaded_or_read_ends_in_one_line(prompts, tmp_path, data):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="expected one of the suffixes"):
        run_batch(
            BatchTask("generate", prompts_in(str(prompts), "which"), "which"), [str(tmp_path / "notes.txt")], "o"
        )
    with pytest.raises(ConfigError, match=r"a worker could not be loaded: .*absent"):
        run_batch(BatchTask("generate", {"a": str(tmp_path / "absent")}), [str(data)], tmp_path / "out")
