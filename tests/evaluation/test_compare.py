"""Prompts on the same records, each against the first."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from softprompt.errors import ConfigError
from softprompt.evaluation import Baseline, compare, evaluate
from softprompt.evaluation.compare import _paired
from softprompt.evaluation.report import Outcome, Report

TEXTS = ["fine work", "never again", "ok", "it broke", "a b c", "so it goes", "no", "late again", "thank you"]
ROWS = [{"input": text, "output": ("good", "poor", "so so")[i % 3]} for i, text in enumerate(TEXTS)]
FREE = {"task": "generation", "labels": None}


def report(values, task="classification"):
    outcomes = [Outcome(i, {}, "a", "a", bool(value), value) for i, value in enumerate(values, start=1)]
    return Report(task=task, rows=len(values), without_prompt=False, outcomes=tuple(outcomes))


def binomial_tail(won, lost):
    """The two-sided exact test by its definition: all outcomes that are no likelier than the one seen."""
    total = won + lost
    ways = [math.comb(total, k) for k in range(total + 1)]
    return sum(each for each in ways if each <= ways[won]) / 2**total


@pytest.mark.parametrize(("won", "lost", "both"), [(9, 1, 20), (1, 1, 0), (0, 0, 5), (3, 14, 2)])
def test_mcnemar_is_the_exact_binomial_test_of_won_against_lost(won, lost, both):
    first = report([0] * won + [1] * lost + [1] * both)
    other = report([1] * won + [0] * lost + [1] * both)
    found = _paired(first, other)
    assert (found.won, found.lost) == (won, lost)
    assert found.p_value == pytest.approx(binomial_tail(won, lost))
    assert found.difference == pytest.approx((won - lost) / (won + lost + both))


def test_the_interval_of_the_difference_is_that_of_a_slow_paired_bootstrap():
    draw = np.random.default_rng(3)
    ours, theirs = draw.random(120), draw.random(120)
    found = _paired(report(theirs, "generation"), report(ours, "generation"))
    resamples = [draw.integers(0, 120, 120) for _ in range(2000)]
    slow = [ours[each].mean() - theirs[each].mean() for each in resamples]
    assert found.interval == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.02)
    assert (found.won, found.lost) == (int((ours > theirs).sum()), int((ours < theirs).sum()))


def test_a_comparison_is_the_reports_of_each_alone(make_tuned, tmp_path):
    first, other = make_tuned(), make_tuned(template="Q: {{input}} A:")
    path = tmp_path / "out.jsonl"
    found = compare({"first": first, "other": other, "zero": Baseline()}, ROWS, predictions=path)
    assert found.reports["first"] == evaluate(first, ROWS)
    assert found.reports["other"] == evaluate(other, ROWS)
    assert found.reports["zero"].accuracy == evaluate(first, ROWS, without_prompt=True).accuracy
    right = {name: [each.right for each in own.outcomes] for name, own in found.reports.items()}
    for name, own in found.against.items():
        assert own.won == sum(a and not b for a, b in zip(right[name], right["first"], strict=True))
        assert own.lost == sum(b and not a for a, b in zip(right[name], right["first"], strict=True))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["first"] == "first"
    assert values["reports"]["other"]["prompt_tokens"] == 4
    assert values["reports"]["zero"]["prompt_tokens"] == 0
    assert all(own["seconds_per_record"] > 0 for own in values["reports"].values())
    assert values["against_first"]["zero"]["p_value"] == found.against["zero"].p_value
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["prompt"] for each in lines] == ["first"] * 9 + ["other"] * 9 + ["zero"] * 9


def test_the_table_says_who_won_and_what_it_costs(make_tuned):
    found = compare([make_tuned(), Baseline()], ROWS)
    lines = str(found).splitlines()
    assert lines[0] == "classification, 9 records"
    assert {"accuracy", "MCC", "95", "prompt", "tokens", "ms", "record"} <= set(lines[1].split())
    head = next(line for line in lines if "against 1" in line)
    assert {"difference", "won", "lost", "p"} <= set(head.split())
    assert lines[-1].split()[0] == "zero-shot"


def test_texts_are_compared_by_their_overlap(make_tuned):
    found = compare([make_tuned(**FREE), Baseline()], ROWS)
    first, other = found.reports.values()
    assert found.against["zero-shot"].difference == pytest.approx(other.rouge_l - first.rouge_l)


def test_what_cannot_be_compared_is_refused(make_tuned):
    one = make_tuned()
    with pytest.raises(ConfigError, match=r"different label sets.*'bad', 'poor'.*one label set"):
        compare({"a": one, "b": make_tuned(labels=("good", "bad", "so so"))}, ROWS)
    with pytest.raises(ConfigError, match=r"a answers by classification and b by generation"):
        compare({"a": one, "b": make_tuned(**FREE)}, ROWS)
    with pytest.raises(ConfigError, match="two prompts or more"):
        compare([one], ROWS)
    with pytest.raises(ConfigError, match="a name of its own"):
        compare([Baseline(), Baseline()], ROWS)
    with pytest.raises(ConfigError, match="the task 'x' would be ignored"):
        compare([one, Baseline()], ROWS, task_name="x")
    with pytest.raises(ConfigError, match="needs a base"):
        compare([Baseline(), Baseline(instruction="a")], ROWS)
    assert compare({"a": one, "b": make_tuned(**FREE)}, ROWS, task="generation").reports["b"].task == "generation"
