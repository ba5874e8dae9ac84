"""Records that a prompt's own run file names: read unasked where its user works, and nowhere else."""

from __future__ import annotations

import json

import pytest

from oracles.serving import write_prompt
from softprompt.backbone import load_base
from softprompt.cli.inputs import recorded_data
from softprompt.cli.main import run

ROWS = "".join(json.dumps({"input": f"text {i}", "output": "yes" if i % 2 else "no"}) + "\n" for i in range(6))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with a prompt in it, and records in it and beside it."""
    (tmp_path / "work" / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for folder in (tmp_path, tmp_path / "work", tmp_path / "work" / "runs" / "a"):
        (folder / "rows.jsonl").write_text(ROWS if folder == tmp_path else ROWS.replace("text", "other"))
    return tmp_path / "work"


def named(work, path, folder="runs/a"):
    (work / folder / "run.toml").write_text(f"train_data = {json.dumps(str(path))}\n")
    return recorded_data(folder)


def test_records_in_the_working_directory_are_read_unasked(work, tmp_path, capsys):
    (work / "data").symlink_to(tmp_path)  # the user's own link
    assert named(work, "rows.jsonl") == "rows.jsonl"
    assert named(work, "./rows.jsonl") == "rows.jsonl"
    assert named(work, work / "rows.jsonl") == str(work / "rows.jsonl")
    assert named(work, "data/rows.jsonl") == "data/rows.jsonl"
    assert named(work, "runs/a/rows.jsonl") == "runs/a/rows.jsonl"
    assert named(work, "gone.jsonl") is None
    assert named(work, "x" * 5000) is None
    assert capsys.readouterr().err == ""


def test_records_elsewhere_are_not(work, tmp_path, capsys, monkeypatch):
    (work / "runs" / "a" / "link").symlink_to(tmp_path)
    (work / "runs" / "a" / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", "../rows.jsonl", "runs/a/link/rows.jsonl", "runs/a/link.jsonl"):
        assert named(work, path) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "is not read unasked outside the working directory: --data names it" in said
    assert named(work, "runs/a/link/../rows.jsonl") == "runs/a/rows.jsonl"
    (work / "above.jsonl").write_text(ROWS)
    named(work, "./above.jsonl")
    monkeypatch.chdir(work / "runs")
    assert recorded_data("a") is None  # found from a folder above the run file, which may be anybody's


def test_the_commands_do_not_open_them(work, tmp_path, capsys):
    write_prompt(work / "runs" / "b", load_base("demo"), labels=("yes", "no"))
    named(work, tmp_path / "rows.jsonl", "runs/b")
    assert run(["inspect", "runs/b", "--json"]) == 0
    found, said = capsys.readouterr()
    assert not json.loads(found)["records"]
    assert "--data names it" in said
    words = ["evaluate", "runs/b", "--data", "rows.jsonl", "--baselines", "few-shot"]
    assert run(words) == 2
    assert "--examples names it" in capsys.readouterr().err
    assert run([*words, "--examples", str(tmp_path / "rows.jsonl"), "--json"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate", "runs/b", "--data", "rows.jsonl", "--instruction", "/dev/zero"], "is a device or a pipe"),
        (
            ["distill", "--base-model", "demo", "--document", "/dev/zero", "--self-study", "1", "--output", "o"],
            "is a device or a pipe",
        ),
        (["generate", "runs/b", "--text", "x", "--json-schema", "/dev/zero"], "at most 65,536 characters"),
        (
            ["distill", "--base-model", "demo", "--document", "long", "--self-study", "1", "--output", "o"],
            "larger than 67,108,864",
        ),
        (["evaluate", "runs/b", "--data", "rows.jsonl", "--instruction", "long"], "larger than 2,097,152"),
    ],
)
def test_endless_texts_are_refused(work, capsys, words, says):
    write_prompt(work / "runs" / "b", load_base("demo"), labels=("yes", "no"))
    with open("long", "wb") as file:
        file.truncate(1 << 40)
    assert run(words) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_lines_of_a_text_end_as_on_every_system(work):
    from softprompt.errors import UsageError
    from softprompt.untrusted import read_text

    (work / "text").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(work / "text", 20, UsageError) == "one\ntwo\nthree\n"
