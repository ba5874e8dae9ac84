from __future__ import annotations

import json
import math

import pytest

from oracles.slow import only
from softprompt.engine import EngineRow
from softprompt.errors import ConfigError, ContextOverflowError, DataError, TemplateError
from softprompt.evaluation import evaluate, passes
from softprompt.generation import GenerationOptions

ROWS = [
    {"input": text, "output": label}
    for text, label in [
        ("fine work", "good"),
        ("never again, and I mean it", "poor"),
        ("ok", "so so"),
        ("it broke", "poor"),
        ("who knows", "unheard of"),
    ]
]
FREE = {"task": "generation", "labels": None}


def log_prob(tuned, text, target, *, prompted=True):
    source, _ = tuned.rows.source({"input": text})
    row = EngineRow(source, tuned.rows.target(target), tuned.prompt() if prompted else None)
    return float(tuned.engine.target_log_probs([row]).values.sum())


def test_labels_are_scored_and_counted(make_tuned):
    tuned = make_tuned()
    predicted = tuned([row["input"] for row in ROWS])
    report = evaluate(tuned, ROWS)
    assert report.rows == 5
    assert report.accuracy == sum(p == r["output"] for p, r in zip(predicted, ROWS, strict=True)) / 5
    assert report.invalid == 1
    assert {k: v for k, v in report.predictions.items() if v} == {
        label: predicted.count(label) for label in set(predicted)
    }
    assert sum(sum(row.values()) for row in report.confusion.values()) == 5
    assert (report.exact_match, report.rouge_l) == (None, None)


def test_label_perplexity_is_over_the_rows_whose_label_is_known(make_tuned):
    tuned = make_tuned()
    total = sum(log_prob(tuned, r["input"], r["output"]) for r in ROWS[:4])
    tokens = sum(len(tuned.rows.label(r["output"])) for r in ROWS[:4])
    assert evaluate(tuned, ROWS).perplexity == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    assert evaluate(tuned, ROWS[4:]).perplexity is None


def test_the_base_alone_sees_the_template_and_no_prompt(make_tuned):
    tuned = make_tuned()
    sources = [tuned.rows.source({"input": row["input"]})[0] for row in ROWS]
    ids = tuned.label_ids(tuned.labels)
    rows = [EngineRow(source, each) for source in sources for each in ids]
    sums = tuned.engine.target_log_probs(rows).row_sums(len(rows))
    best = sums.view(len(sources), len(ids)).argmax(1).tolist()
    report = evaluate(tuned, ROWS, without_prompt=True)
    assert report.without_prompt
    assert report.predictions == {label: best.count(k) for k, label in enumerate(tuned.labels)}
    assert report.perplexity != evaluate(tuned, ROWS).perplexity


def test_normalised_ranking_is_by_log_probability_per_token(make_tuned):
    tuned = make_tuned()
    texts = [row["input"] for row in ROWS]
    best = [each.label for each in tuned.classify(texts, normalize=True)]
    report = evaluate(tuned, ROWS, normalize=True)
    assert report.predictions == {label: best.count(label) for label in tuned.labels}


@pytest.mark.parametrize("changes", [{}, FREE])
@pytest.mark.parametrize("without_prompt", only([False], [False, True]))
def test_the_batch_size_changes_nothing(make_tuned, changes, without_prompt):
    tuned = make_tuned(**changes)
    one, many = (
        evaluate(tuned, ROWS, batch_size=size, without_prompt=without_prompt).to_dict() for size in (1, 100)
    )
    assert one.pop("perplexity") == pytest.approx(many.pop("perplexity"), rel=1e-4)
    assert one == many


def test_free_text_is_generated_and_compared(make_tuned):
    tuned = make_tuned(**FREE)
    answers = tuned([row["input"] for row in ROWS])
    rows = [dict(row, output=answer) for row, answer in zip(ROWS, answers, strict=True)]
    rows[0]["output"] = "something else"
    report = evaluate(tuned, rows)
    assert report.exact_match == pytest.approx(4 / 5)
    assert report.invalid is None
    assert report.accuracy is None
    assert 0 <= report.rouge_l <= 1


def test_free_text_perplexity_by_hand(make_tuned):
    tuned = make_tuned(**FREE)
    for prompted in (True, False):
        total = sum(log_prob(tuned, r["input"], r["output"], prompted=prompted) for r in ROWS)
        tokens = sum(len(tuned.rows.target(r["output"])) for r in ROWS)
        report = evaluate(tuned, ROWS, without_prompt=not prompted)
        assert report.perplexity == pytest.approx(math.exp(-total / tokens), rel=1e-4)


def test_free_text_of_the_base_alone(make_tuned):
    tuned = make_tuned(**FREE)
    sources = [tuned.rows.source({"input": row["input"]})[0] for row in ROWS]
    options = GenerationOptions(max_new_tokens=8)
    answers = tuned.generate_rows(sources, options, without_prompt=True)
    rows = [dict(row, output=a.text) for row, a in zip(ROWS, answers, strict=True)]
    assert evaluate(tuned, rows, without_prompt=True).exact_match == 1
    assert evaluate(tuned, rows).exact_match < 1


def test_a_classifier_evaluated_by_generation_counts_answers_outside_its_labels(make_tuned):
    report = evaluate(make_tuned(), ROWS, task="generation")
    assert report.task == "generation"
    # A random model writes none of the labels.
    assert report.invalid == 5
    assert report.exact_match == 0


def test_cut_rows_are_counted(make_tuned):
    rows = [*ROWS, {"input": "x" * 60, "output": "y" * 20}]
    report = evaluate(make_tuned(**FREE), rows)
    # "unheard of" takes more than 8 tokens as well.
    assert (report.inputs_cut, report.targets_cut) == (1, 2)


def test_data_may_be_a_file_and_limited(make_tuned, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tuned = make_tuned()
    assert evaluate(tuned, path) == evaluate(tuned, ROWS)
    assert evaluate(tuned, path, limit=2) == evaluate(tuned, ROWS[:2])


def test_columns_are_those_of_the_tuning_unless_named(make_tuned):
    rows = [{"review": row["input"], "stars": row["output"]} for row in ROWS]
    columns = {"input_field": "review", "output_field": "stars"}
    expected = evaluate(make_tuned(), ROWS)
    assert evaluate(make_tuned(settings=columns), rows) == expected
    assert evaluate(make_tuned(), rows, **columns) == expected


def test_a_report_is_json_and_a_table(make_tuned):
    for changes in ({}, FREE):
        report = evaluate(make_tuned(**changes), ROWS)
        json.dumps(report.to_dict(), allow_nan=False)
        assert "5 rows" in str(report)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit expects at least 1 row"),
        ({"batch_size": 0}, "batch_size expects at least 1"),
        ({"task": "guessing"}, "task expects classification or generation"),
        ({"task": "generation", "normalize": True}, "normalize would be ignored"),
    ],
)
def test_wrong_options_are_refused(make_tuned, options, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(make_tuned(), ROWS, **options)


def test_labels_cannot_be_scored_without_a_label_set(make_tuned):
    with pytest.raises(ConfigError, match="needs a label set"):
        evaluate(make_tuned(**FREE), ROWS, task="classification")


def test_no_rows_are_refused(make_tuned, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        evaluate(make_tuned(), tmp_path / "empty.jsonl")


def test_a_row_without_tokens_is_refused(make_tuned):
    with pytest.raises(DataError, match="input 1 has no tokens"):
        evaluate(make_tuned(template="{{input}}"), [{"input": "", "output": "good"}])


def test_rows_without_the_templates_field_are_refused(make_tuned):
    with pytest.raises(TemplateError, match="subject"):
        evaluate(make_tuned(template="{{subject}}: {{input}}"), ROWS)


def test_a_row_beyond_the_context_is_refused(make_tuned):
    tuned = make_tuned(max_source_length=300)
    with pytest.raises(ContextOverflowError, match="4 virtual tokens"):
        evaluate(tuned, [{"input": "x" * 200, "output": "good"}])


def test_every_engine_gives_the_same_report(make_tuned):
    tuned = make_tuned()
    reports = [evaluate(tuned, ROWS, engine=name) for name in ("forest", "expand", "plain")]
    assert len({report.accuracy for report in reports}) == 1
    for report in reports[1:]:
        assert report.perplexity == pytest.approx(reports[0].perplexity, rel=1e-4)


def test_a_row_beyond_the_context_is_refused_before_any_pass(make_tuned, monkeypatch):
    tuned = make_tuned(max_source_length=300)
    monkeypatch.setattr(passes, "classify_rows", None)
    with pytest.raises(ContextOverflowError, match="4 virtual tokens"):
        evaluate(tuned, [*ROWS, {"input": "x" * 200, "output": "good"}])
