"""``softprompt inspect``: the numbers as JSON and text, and mistakes in one line."""

from __future__ import annotations

import json
import sys

import pytest

from oracles.tuned import untrained
from softprompt.artifacts import Manifest
from softprompt.backbone import load_base
from softprompt.cli.main import run
from softprompt.prompts import PromptTuningConfig

KINDS = [("it broke again", "complaint"), ("lovely, thank you", "no complaint")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a prompt on the bundled model, its run file, and records."""
    place = tmp_path_factory.mktemp("place")
    rows = [{"input": f"{text} {i}", "output": label} for i in range(4) for text, label in KINDS]
    (place / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = load_base("demo")
    manifest = Manifest(
        template="Message: {{input}}\nLabel:",
        task="classification",
        labels=("complaint", "no complaint"),
        base_model="demo",
        base_fingerprint=base.fingerprint_record(),
        max_source_length=64,
        max_target_length=8,
        dtype="float32",
        seq2seq=False,
    )
    untrained(base, PromptTuningConfig(num_virtual_tokens=2), manifest, seed=3).save(place / "prompt")
    (place / "prompt" / "run.toml").write_text('validation_data = "held_out.jsonl"\n')
    return place


@pytest.fixture
def called(place, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def call(*arguments):
        code = run(["inspect", "prompt", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_numbers_on_the_recorded_data_with_a_report(called, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # the figures are drawn in a test of their own
    code, out, err = called("--json", "--limit", "2", "--output", tmp_path / "report", "--nearest", "2")
    assert code == 0, err
    found = json.loads(out)
    assert "held_out.jsonl" in err
    assert found["records"] == 2
    assert len(found["leave_one_out"]["change"]) == 2
    assert [len(row) for row in found["values"]["input"]["nearest"]] == [2, 2]
    assert json.loads((tmp_path / "report" / "inspection.json").read_text())["values"] == found["values"]
    assert called("--no-base", "--output", tmp_path / "report")[0] == 2  # it holds a report


def test_text_of_the_artifact_alone(called):
    code, out, err = called("--no-base", "--quiet")
    assert (code, err) == (0, "")
    assert "effective rank" in out
    assert "contest: without its base: left out as asked" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-base", "--data", "held_out.jsonl"], "--no-base"),
        (["--overwrite"], "--overwrite"),
        (["--limit", "0"], "--limit expects at least 1"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--against", "absent"], "absent"),
        (["--base-model", "/absent"], "/absent"),
        (["--task-name", "x"], "no task 'x'"),
    ],
)
def test_mistakes_are_one_line(called, words, message):
    code, out, err = called(*words, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_prompt_that_is_not_there(place, capsys):
    assert run(["inspect", str(place / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
