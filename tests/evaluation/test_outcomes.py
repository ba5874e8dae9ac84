"""What became of each record: in the report, in the file of predictions, on the terminal."""

from __future__ import annotations

import io
import json
import sys
from contextlib import contextmanager

import pytest

from softprompt.errors import OutputExistsError
from softprompt.evaluation import Baseline, calibration_error, evaluate, passes
from softprompt.inference import Ensemble

ROWS = [
    {"input": text, "output": label, "id": number}
    for number, (text, label) in enumerate(
        [
            ("fine work", "good"),
            ("never again", "poor"),
            ("ok", "so so"),
            ("it broke", "poor"),
            ("who", "odd one"),
        ]
    )
]
FREE = {"task": "generation", "labels": None}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("normalize", [False, True])
def test_the_predictions_of_labels_are_the_report(make_tuned, tmp_path, normalize):
    tuned, path = make_tuned(), tmp_path / "new" / "out.jsonl"
    report = evaluate(tuned, ROWS, predictions=path, normalize=normalize)
    found = read(path)
    answers = tuned.classify([row["input"] for row in ROWS], normalize=normalize)
    assert [each["record"] for each in found] == [1, 2, 3, 4, 5]
    assert [each["fields"] for each in found] == [{"input": row["input"], "id": str(row["id"])} for row in ROWS]
    assert [each["target"] for each in found] == [row["output"] for row in ROWS]
    assert [each["answer"] for each in found] == [each.label for each in answers]
    for each, answer in zip(found, answers, strict=True):
        assert each["probabilities"] == pytest.approx(dict(answer.probabilities), abs=1e-5)
        assert each["score"] == each["probabilities"][each["answer"]]
        assert each["right"] == (each["answer"] == each["target"])
    assert report.accuracy == sum(each["right"] for each in found) / 5
    assert report.calibration_error == calibration_error(
        [each["score"] for each in found], [each["right"] for each in found]
    )
    confusion = {}
    for each in found:
        confusion.setdefault(each["target"], []).append(each["answer"])
    assert report.confusion == {
        gold: {got: answers.count(got) for got in answers} for gold, answers in confusion.items()
    }
    assert "prompt" not in found[0]


def test_the_predictions_of_texts_are_the_report(make_tuned, tmp_path):
    tuned, path = make_tuned(**FREE), tmp_path / "out.jsonl"
    answers = tuned([row["input"] for row in ROWS])
    rows = [dict(row, output=answer) for row, answer in zip(ROWS, answers, strict=True)]
    rows[1]["output"] = "quite another"
    report = evaluate(tuned, rows, predictions=path)
    found = read(path)
    assert [each["answer"] for each in found] == answers
    assert [each["right"] for each in found] == [True, False, True, True, True]
    assert report.exact_match == 0.8
    assert report.rouge_l == pytest.approx(sum(each["score"] for each in found) / 5)
    assert "probabilities" not in found[0]


def test_texts_stay_with_their_records_however_they_are_batched(make_tuned):
    rows = [{"input": "x" * (7 * i % 11 + 1) + str(i), "output": "y"} for i in range(20)]
    few, many = (evaluate(make_tuned(**FREE), rows, batch_size=size).outcomes for size in (2, 50))
    assert few == many
    assert [each.fields["input"] for each in few] == [row["input"] for row in rows]


def test_predictions_replace_nothing_unasked_and_appear_whole(make_tuned, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        evaluate(make_tuned(), ROWS, predictions=path)
    assert path.read_text() == "mine\n"
    evaluate(make_tuned(), ROWS, predictions=path, overwrite=True)
    assert len(read(path)) == 5


def test_predictions_of_several_prompts_have_their_names(make_tuned, tmp_path):
    path = tmp_path / "out.jsonl"
    evaluate(make_tuned(), ROWS, baselines=[Baseline()], predictions=path)
    assert [each["prompt"] for each in read(path)] == ["tuned prompt"] * 5 + ["zero-shot"] * 5


def test_an_ensembles_outcomes_are_its_answers(make_tuned):
    ensemble = Ensemble([make_tuned(), make_tuned(template="Q: {{input}} A:")])
    report = evaluate(ensemble, ROWS)
    answers = ensemble.classify([row["input"] for row in ROWS])
    assert [each.answer for each in report.outcomes] == [each.label for each in answers]
    for each, answer in zip(report.outcomes, answers, strict=True):
        assert each.probabilities == pytest.approx(dict(answer.probabilities), abs=1e-5)
    assert [len(each.outcomes) for each in report.members.values()] == [5, 5]


def test_the_terminal_shows_intervals_and_the_confusion_matrix(make_tuned):
    report = evaluate(make_tuned(), ROWS * 20)
    lines = str(report).splitlines()
    low, high = report.intervals["accuracy"]
    assert f"[{low:.4f}, {high:.4f}]" in next(line for line in lines if line.startswith("  accuracy"))
    head = next(number for number, line in enumerate(lines) if line.startswith("  gold \\ predicted"))
    labels = [row.label for row in report.per_label]
    for number, gold in enumerate(labels, start=1):
        name, *counts = lines[head + number].rsplit(maxsplit=len(labels))
        assert name.strip() == f"#{number} {gold}"
        assert [int(each) for each in counts] == [report.confusion.get(gold, {}).get(got, 0) for got in labels]


def test_the_terminal_shows_three_samples_of_texts(make_tuned):
    text = str(evaluate(make_tuned(**FREE), ROWS))
    assert [f"record {number}: " in text for number in range(1, 5)] == [True, True, True, False]
    assert "fine work" in text
    assert "target: poor" in text


@pytest.mark.parametrize("changes", [{}, FREE])
def test_a_bar_shows_on_terminals_what_takes_longer_than_its_delay(make_tuned, monkeypatch, changes):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    totals, bars, progress_bar = [], [], passes.progress_bar

    @contextmanager
    def watched(total, *arguments, **options):
        totals.append(total)
        with progress_bar(total, *arguments, **options) as bar:
            bars.append(bar)
            yield bar

    monkeypatch.setattr(passes, "progress_bar", watched)
    monkeypatch.setattr(passes, "_BAR_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    evaluate(make_tuned(**changes), ROWS, batch_size=3)
    assert [bar.n for bar in bars] == totals == ([5, 5] if changes else [15])
    assert "%|" in sys.stderr.getvalue()
    shown = sys.stderr.getvalue()
    evaluate(make_tuned(**changes), ROWS, silence_progress_bars=True)
    assert sys.stderr.getvalue() == shown
    monkeypatch.setattr(passes, "_BAR_SECONDS", 60.0)
    evaluate(make_tuned(**changes), ROWS)
    assert "%|" not in sys.stderr.getvalue().removeprefix(shown)
