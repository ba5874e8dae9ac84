"""The files of an inspection: numbers, figures that can be read again, and a page that loads nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest

from softprompt import inspect_prompt
from softprompt.errors import OutputExistsError
from softprompt.inspection import write_report
from softprompt.inspection.records import Example

HOSTILE = '<script>alert("x")</script><img src=http://evil/x>{{ 7 * 7 }}\u202e\ud800'


@pytest.fixture
def bare(learnt):
    bare = inspect_prompt(learnt, with_base=False)
    bare.history, bare.values = [], {}  # one figure is left, which is quick
    return bare


def test_numbers_figures_and_page(found, monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    saved, original = [], figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure,
        "savefig",
        lambda self, *args, **kwargs: (saved.append(self), original(self, *args, **kwargs)),
    )
    write_report(found, tmp_path / "new")
    files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    pictures = {"training", "drift", "tokens", "attention_self", "contest", "norms_1", "cosines_1"}
    assert set(files) == {"inspection.json", "report.html", *(f"{name}.png" for name in pictures)}
    assert json.loads(files["inspection.json"]) == json.loads(json.dumps(found.to_dict()))
    page = files["report.html"].decode()
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert all(each.startswith("data:") for each in re.findall(r'(?:src|href|action)="?([^" >]+)', page))
    assert "default-src 'none'" in page
    assert "nothing is missing" in page
    axes = [axis for each in saved for axis in each.axes]
    labels = {axis.get_ylabel() for axis in axes} | {axis.get_xlabel() for axis in axes}
    assert {
        "share of attention on the prompt",
        "added loss without it ± standard error\n(nats per token)",
        "layer",
        "epoch",
    } <= labels
    assert {"norm of the embedding", "distance from the start\n(rms over the values)", "cosine"} <= labels
    assert "records, of 8" in labels


def test_what_files_and_data_say_is_text_and_nothing_else(found, tmp_path):
    summary = dataclasses.replace(
        found.summary, location=HOSTILE, template=HOSTILE, labels=(HOSTILE,), metrics={HOSTILE: 1.0}
    )
    own = found.contest.against["zero-shot"]
    example = Example(1, True, {HOSTILE: HOSTILE}, target=HOSTILE, prompt=HOSTILE, other=HOSTILE)
    contest = dataclasses.replace(
        found.contest,
        against={HOSTILE: own, "$a_b$ {": own},
        examples={HOSTILE: [example]},
        scores={**found.contest.scores, HOSTILE: {"accuracy": 0.5}},
    )
    hostile = dataclasses.replace(
        found, summary=summary, contest=contest, words=HOSTILE, missing={"x": HOSTILE}, task_name=HOSTILE
    )
    hostile.history, hostile.drift, hostile.attention, hostile.leave_one_out, hostile.values = (
        [],
        None,
        None,
        None,
        {},
    )
    write_report(hostile, tmp_path / "new")
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=http" not in page
    assert "{{ 7 * 7 }}" in page
    assert "&lt;script&gt;" in page
    assert json.loads((tmp_path / "new" / "inspection.json").read_text())["words"] == HOSTILE


def test_nothing_is_replaced_unasked(bare, tmp_path):
    place = tmp_path / "full"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    (place / "contest.png").write_text("of an earlier inspection")
    with pytest.raises(OutputExistsError):
        write_report(bare, place)
    assert sorted(each.name for each in place.iterdir()) == ["contest.png", "mine.txt"]
    write_report(bare, place, overwrite=True)
    names = {each.name for each in place.iterdir()}
    assert {"mine.txt", "report.html"} <= names
    assert "contest.png" not in names


def test_without_matplotlib_the_page_says_so(bare, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(bare, tmp_path / "new")
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == ["inspection.json", "report.html"]
    assert "softprompt[plot]" in (tmp_path / "new" / "report.html").read_text()


def test_a_history_that_cannot_be_drawn_costs_its_figure_alone(bare, tmp_path):
    pytest.importorskip("matplotlib")
    bare.history = [{"epoch": "first", "loss": {}}, {"loss": 2}]
    write_report(bare, tmp_path / "new")
    names = {each.name for each in (tmp_path / "new").iterdir()}
    assert "training.png" not in names
    assert "drift.png" in names
    assert "figure training" in json.loads((tmp_path / "new" / "inspection.json").read_text())["missing"]
