"""Data as people have it on the command line: stdin, tables of others, names of labels, splits, a dry run."""

import io
import json

import pytest

from softprompt.cli.main import run

QUICK = ["--max-steps", "2", "--num-virtual-tokens", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def rows():
    kinds = [("it broke again", 1), ("lovely, thank you", 0)]
    return [{"Tweet text": f"{text} {n}", "label": label} for n in range(6) for text, label in kinds]


@pytest.fixture
def table(tmp_path, rows):
    path = tmp_path / "tweets.csv"
    lines = [f"{row['Tweet text']};{row['label']}" for row in rows]
    path.write_text("\n".join(["Tweet text;label", *lines]) + "\n")
    return str(path)


NAMES = ("--label-names", "0=praise, thanks,1=complaint")
TWEETS = ("--verbalizer", "{{Tweet text}} Label:", "--output-field", "label", *NAMES)


def result(capsys, *words):
    assert run([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.mark.slow
def test_a_table_of_numbers_is_tuned_evaluated_and_recorded(capsys, table, tmp_path, monkeypatch, rows):
    output = str(tmp_path / "p")
    split = ("--validation-split", "0.25", "--limit", "8")
    found, err = result(capsys, "tune", "--train-data", table, "--output", output, *TWEETS, *split, *QUICK)
    assert "tweets.csv: columns are separated by semicolons, not by commas\n" in err
    assert "6 records, " in err
    assert found["labels"] == ["complaint", "praise, thanks"]
    assert found["steps"] == 2
    assert '[label_names]\n0 = "praise, thanks"' in (tmp_path / "p" / "run.toml").read_text()
    report, _ = result(capsys, "evaluate", output, "--data", table)
    assert (report["rows"], report["invalid"]) == (12, 0)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    again, _ = result(capsys, "evaluate", output, "--data", "-")
    assert again["accuracy"] == report["accuracy"]
    repeated, _ = result(capsys, "tune", "--config", f"{output}/run.toml", "--output", str(tmp_path / "q"))
    assert repeated["final_loss"] == found["final_loss"]


def test_a_dry_run_needs_no_output_and_writes_nothing(capsys, table, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found, _ = result(capsys, "tune", "--train-data", table, *TWEETS, *QUICK, "--dry-run")
    assert found["steps"] == 2
    assert found["tasks"][0]["labels"] == {"complaint": 6, "praise, thanks": 6}
    assert found["samples"][0]["input"].startswith("[2 virtual tokens]it broke again 0 Label:")
    assert run(["tune", "--train-data", table, *TWEETS, *QUICK, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("record 1, ")
    assert out.endswith("nothing was trained and nothing written\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_learnt_nothing_ends_with_that(capsys, table, tmp_path):
    words = ["tune", "--train-data", table, *TWEETS, *QUICK, "--output", str(tmp_path / "p")]
    assert run([*words, "--validation-split", "0.5", "--learning-rate", "1e-9"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split(maxsplit=1)[1].startswith("the prompt learnt nothing: validation accuracy ")
    assert "warning: --learning-rate 1e-09 is far below what suits this base" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label-names", "0"], "--label-names takes TARGET=NAME,TARGET=NAME; got '0'"),
        (["--label-names", "0=a,0=b"], "--label-names names '0' twice"),
        (["--label-names", "1=complaint"], "the target '0' has no name in --label-names, which has 1; add it"),
        ([*NAMES, "--validation-split", "0.01"], "--validation-split 0.01 of 12 records of 2 labels leaves 0"),
        ([*NAMES, "--validation-split", "1"], "--validation-split must be at most 0.9"),
        ([*NAMES, "--max-steps", "0"], "--max-steps must be at least 1"),
        ([*NAMES, "--limit", "0"], "--limit must be at least 1"),
        ([*NAMES, "--early-stopping-patience", "1"], "needs --validation-data or --validation-split"),
    ],
)
def test_a_mistake_is_one_line_of_options(capsys, table, words, message):
    columns = ["--input-field", "Tweet text", "--output-field", "label"]
    assert run(["tune", "--train-data", table, *columns, *words, "--dry-run", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
