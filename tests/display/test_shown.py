"""What interpreters and notebooks show of prompts, reports and servings, and the figures they draw."""

from __future__ import annotations

import sys
from html.parser import HTMLParser

import pytest

from oracles.served import served
from softprompt import Report, Serving
from softprompt.display import curve_html
from softprompt.errors import ConfigError
from softprompt.evaluation.metrics import LabelRow

HOSTILE = "<script>alert('&')</script>"
HISTORY = [{"epoch": n, "loss": 2.0 / n, "validation": {"accuracy": 0.5 + n / 10, "loss": 1.0 / n}} for n in (1, 2)]


class Tags(HTMLParser):
    """Checks that tags are balanced, and keeps their names and the text between them."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.open += [] if tag == "img" else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def row(label):
    return LabelRow(label=label, support=10, predicted=9, precision=0.9, recall=0.8, f1=0.85)


def report(labels, **values):
    confusion = {gold: {got: 8 if gold == got else 1 for got in labels} for gold in labels}
    return Report(
        task="classification",
        rows=20,
        without_prompt=False,
        accuracy=0.8,
        macro_f1=0.75,
        confusion=confusion,
        per_label=tuple(map(row, labels)),
        **values,
    )


@pytest.fixture(scope="module")
def prompts():
    return served("llama", kinds=("plain",)).prompts


def test_a_prompt_shows_what_it_is(prompts):
    tuned = prompts["plain"].snapshot()
    tuned.manifest.history.extend(HISTORY)
    tuned.manifest.metrics["validation"] = {"accuracy": 0.7, "loss": 0.5}
    try:
        line = repr(tuned)
        assert line.startswith(f"TunedPrompt({tuned.manifest.task}, ")
        assert "method=PROMPT_TUNING" in line
        assert line.endswith("accuracy=0.7, loss=0.5)")
        tags = Tags(tuned._repr_html_())
        assert "template" in tags.text
        assert ("img" in tags.seen) is (curve_html(HISTORY) != "")
        pytest.importorskip("matplotlib")
        assert tuned.plot_training().axes[0].get_xlabel() == "epoch"
    finally:
        tuned.manifest.history.clear()
        del tuned.manifest.metrics["validation"]


def test_a_report_shows_numbers_and_labels_and_escapes_them():
    found = report(["good", HOSTILE])
    assert repr(found) == "Report(classification, 20 rows, accuracy=0.8, macro_f1=0.75)"
    tags = Tags(found._repr_html_())
    assert "script" not in tags.seen
    assert HOSTILE in tags.text
    assert {"accuracy", "0.8", "support", "0.85"} <= set(tags.text.split())


def test_members_stand_beside_each_other():
    found = report(["a", "b"], members={"first": report(["a"]), "second": report(["b"])}, combine="mean")
    tags = Tags(found._repr_html_())
    assert {"first", "second"} <= set(tags.text.split())
    figure = pytest.importorskip("matplotlib.figure")
    drawn = found.plot()
    assert isinstance(drawn, figure.Figure)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["first", "second"]


def test_a_serving_lists_its_prompts(prompts):
    tuned = prompts["plain"].snapshot()
    tuned.manifest.metrics["validation"] = {"accuracy": 2 / 3, "note": "none"}
    try:
        with Serving({HOSTILE: tuned}) as serving:
            assert repr(serving).startswith("Serving(1 prompt on ")
            tags = Tags(serving._repr_html_())
    finally:
        del tuned.manifest.metrics["validation"]
    assert "script" not in tags.seen
    assert HOSTILE in tags.text
    assert {"metrics", "accuracy", "0.6667"} <= set(tags.text.split())
    assert "note" not in tags.text


def test_the_confusion_matrix_has_its_counts_and_labels():
    pytest.importorskip("matplotlib")
    drawn = report(["good", "a label that is far too long to be written out"]).plot()
    matrix, bar = drawn.axes
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted label", "gold label")
    assert bar.get_ylabel() == "share of the gold label's records"
    assert [text.get_text() for text in matrix.texts] == ["8", "1", "1", "8"]
    assert [tick.get_text() for tick in matrix.get_yticklabels()] == ["good", "a label that… written out"]
    assert drawn.get_suptitle() == "20 records, accuracy 0.800, macro F1 0.750"
    assert drawn._repr_png_().startswith(b"\x89PNG")


def test_many_labels_are_drawn_without_counts():
    pytest.importorskip("matplotlib")
    names = [f"label {n}" for n in range(30)]
    matrix = report(names).plot().axes[0]
    assert not matrix.texts
    assert len(matrix.get_xticklabels()) == 30


def test_texts_get_bars_of_their_metrics():
    pytest.importorskip("matplotlib")
    values = {"exact_match": 0.4, "rouge_l": 0.7, "perplexity": 12.0}
    (axis,) = Report(task="generation", rows=3, without_prompt=False, **values).plot().axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["exact match", "ROUGE-L"]
    assert [round(bar.get_width(), 2) for bar in axis.patches] == [0.4, 0.7]


def test_what_cannot_be_drawn_says_why(monkeypatch):
    with pytest.raises(ConfigError, match="the report has none"):
        Report(task="generation", rows=3, without_prompt=False, perplexity=12.0).plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "softprompt\[plot\]"'):
        report(["a", "b"]).plot()
    assert curve_html(HISTORY) == ""
