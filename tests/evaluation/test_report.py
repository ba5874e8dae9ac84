from __future__ import annotations

import json
import math

from softprompt.evaluation import Report
from softprompt.evaluation.metrics import LabelRow
from softprompt.evaluation.report import numbers_table


def test_a_report_is_plain_json_without_nan():
    report = Report(task="generation", rows=3, without_prompt=False, perplexity=math.inf, rouge_l=0.5)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["rows"] == 3
    assert values["perplexity"] is None
    assert values["rouge_l"] == 0.5
    assert values["accuracy"] is None


def test_labels_are_listed_as_objects():
    report = Report(
        task="classification",
        rows=1,
        without_prompt=True,
        per_label=(LabelRow("a", 1, 1, 1.0, 1.0, 1.0),),
    )
    assert report.to_dict()["per_label"][0]["label"] == "a"
    assert json.dumps(report.to_dict())


def test_the_table_names_what_was_evaluated_and_leaves_out_what_does_not_apply():
    text = str(
        Report(
            task="classification",
            rows=1200,
            without_prompt=True,
            accuracy=0.5,
            invalid=2,
            collapsed=True,
        )
    )
    assert text.splitlines()[0] == "base without prompt, classification, 1,200 rows"
    assert "accuracy" in text
    assert "0.5000" in text
    assert "ROUGE-L" not in text
    assert "invalid" in text
    assert "collapsed" in text


def test_many_labels_show_the_worst():
    rows = tuple(LabelRow(f"label {i}", 1, 1, 1.0, 1.0, i / 100) for i in range(77))
    text = str(Report(task="classification", rows=77, without_prompt=False, per_label=rows))
    assert "20 lowest F1" in text
    assert "label 3 " in text
    assert "label 70" not in text


def test_a_table_of_reports_tells_the_rows_where_they_are_not_the_same():
    def table(*rows):
        reports = {
            name: Report(task="classification", rows=count, without_prompt=False, accuracy=count / 2000)
            for name, count in zip("ab", rows, strict=True)
        }
        return [each.split() for each in numbers_table("task", reports)]

    assert table(5, 1200) == [["task", "rows", "accuracy"], ["a", "5", "0.0025"], ["b", "1,200", "0.6000"]]
    assert table(5, 5)[0] == ["task", "accuracy"]
