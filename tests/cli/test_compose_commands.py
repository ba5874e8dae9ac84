"""``compose`` and ``similar`` on folders that need no model."""

from __future__ import annotations

import json

import pytest
import torch

from oracles.stored import drawn, folder
from softprompt.artifacts import load_adapter
from softprompt.cli.main import run


@pytest.fixture
def pair(tmp_path):
    return [str(folder(tmp_path / "prompts" / n, drawn(i))) for i, n in enumerate(("a", "b"))]


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


def printed(capsys, *arguments):
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def rows(path):
    return load_adapter(path).values


def test_average(capsys, pair, output):
    weights = ["--weight", "3", "--weight", "1"]
    found, _ = printed(capsys, "compose", "average", *pair, *weights, "--output", output)
    assert found["output"] == output
    assert found["composition"] == {"operation": "average", "weights": [3.0, 1.0]}
    assert [each["prompt"] for each in found["made_of"].values()] == pair
    torch.testing.assert_close(rows(output), 0.75 * drawn(0) + 0.25 * drawn(1))


def test_concat(capsys, pair, output):
    found, _ = printed(capsys, "compose", "concat", *pair, "--output", output)
    assert found["virtual_tokens"] == 6
    assert torch.equal(rows(output), torch.cat([drawn(0), drawn(1)]))


def test_difference(capsys, pair, output):
    options = ["--onto", pair[1], "--scale", "2", "--output", output]
    printed(capsys, "compose", "difference", *pair, *options)
    torch.testing.assert_close(rows(output), drawn(1) + 2 * (drawn(0) - drawn(1)))


def test_for_people(capsys, pair, output):
    assert run(["compose", "average", *pair, "--output", output]) == 0
    out = capsys.readouterr().out
    assert output in out
    assert pair[1] in out
    assert run(["similar", output, str(load_adapter(pair[0]).location).rpartition("/")[0]]) == 0
    assert capsys.readouterr().out.startswith("similarity  weight  prompt\n")


def test_similar(capsys, pair, tmp_path):
    foreign = str(folder(tmp_path / "prompts" / "foreign", drawn(0), base="two"))
    found, err = printed(capsys, "similar", pair[0], str(tmp_path / "prompts"), "--measure", "pairs")
    assert [each["prompt"] for each in found["found"]] == pair[1:]
    assert [each["folder"] for each in found["skipped"]] == [foreign]
    assert err.startswith(f"warning: skipped {foreign}: its base is two")
    assert err.count("\n") == 1
    (tmp_path / "others").mkdir()
    folder(tmp_path / "others" / "foreign", drawn(0), base="two")
    assert run(["similar", pair[0], str(tmp_path / "others")]) == 0
    assert capsys.readouterr().out == "no prompt to compare with\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compose"], "Missing command"),
        (["compose", "averag"], "average"),
        (
            ["compose", "average", "{a}", "--output", "{out}"],
            "expected 2 prompts or more, got {a}; name",
        ),
        (["compose", "average", "{a}", "{b}", "--output", "{b}"], "--overwrite"),
        (["compose", "average", "{a}", "{b}"], "--output"),
        (["compose", "average", "{a}", "{b}", "--weight", "1", "--output", "{out}"], "2 weights"),
        (["compose", "concat", "{a}", "{c}", "--output", "{out}"], "--template-from"),
        (["compose", "difference", "{a}", "{absent}", "--output", "{out}"], "no folder"),
        (["compose", "difference", "{a}", "{b}", "--scale", "nan", "--output", "{out}"], "finite"),
        (["similar", "{a}", "{a}"], "holds no folders"),
        (["similar", "{a}", "{b}", "--top", "0"], "at least 1"),
        (["similar", "{a}", "{b}", "--measure", "median"], "--measure"),
    ],
)
def test_every_mistake_is_one_line(capsys, pair, tmp_path, output, arguments, message):
    other = folder(tmp_path / "c", drawn(2), template="{{input}}?")
    places = {"a": pair[0], "b": pair[1], "c": str(other), "out": output, "absent": "/no/such"}
    assert run([each.format(**places) for each in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message.format(**places) in err
