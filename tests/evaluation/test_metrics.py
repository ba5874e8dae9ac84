from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from softprompt.evaluation.metrics import LabelRow, label_metrics, rouge_l, text_metrics

GOLD = ["a", "a", "a", "b", "b", "x"]
PREDICTED = ["a", "a", "b", "b", "a", "a"]


def test_label_metrics_by_hand():
    found = label_metrics(GOLD, PREDICTED, ["a", "b", "c"])
    assert found.accuracy == pytest.approx(3 / 6)
    # a: 2 of 4 predicted right, 2 of 3 found; b: 1 of 2 and 1 of 2;
    # c does not occur; x is never right.
    f1_a = 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    assert found.macro_f1 == pytest.approx((f1_a + 0.5 + 0) / 3)
    assert found.invalid == 1
    assert [row.label for row in found.per_label] == ["a", "b", "c", "x"]
    assert found.per_label[1] == LabelRow("b", 2, 2, 0.5, 0.5, 0.5)
    assert found.per_label[2] == LabelRow("c", 0, 0, 0.0, 0.0, 0.0)
    assert found.confusion == {"a": {"a": 2, "b": 1}, "b": {"a": 1, "b": 1}, "x": {"a": 1}}
    assert found.predictions == {"a": 4, "b": 2, "c": 0}
    assert not found.collapsed


def test_macro_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    found = label_metrics(GOLD, PREDICTED, ["a", "b", "c"])
    assert found.macro_f1 == pytest.approx(f1_score(GOLD, PREDICTED, average="macro", zero_division=0))


def test_predictions_on_one_label_are_a_collapse_only_when_gold_is_varied():
    varied = ["a"] * 50 + ["b"] * 50
    assert label_metrics(varied, ["a"] * 96 + ["b"] * 4, ["a", "b"]).collapsed
    assert not label_metrics(varied, ["a"] * 95 + ["b"] * 5, ["a", "b"]).collapsed
    assert not label_metrics(["a"] * 100, ["a"] * 100, ["a", "b"]).collapsed
    assert not label_metrics(["a"] * 97 + ["b"] * 3, ["a"] * 100, ["a", "b"]).collapsed


def test_exact_match_looks_past_outer_white_space_only():
    found = text_metrics(["yes", "no", "a b", "No"], [" yes\n", "no", "a  b", "no"])
    assert found.exact_match == pytest.approx(2 / 4)
    assert found.invalid is None


def test_answers_outside_the_label_set_are_invalid():
    found = text_metrics(["yes", "no"], ["yes ", "maybe"], ["yes", "no"])
    assert found.invalid == 1


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat sat": 3 of 3 target words, 3 of 5 answer words.
    assert rouge_l(["the cat sat"], ["The big cat just sat."]) == [pytest.approx(2 * 1 * 0.6 / 1.6)]
    assert rouge_l(["a b", "c"], ["a b", "d"]) == [1, 0]
    assert rouge_l(["a"], [""]) == [0]


def test_rouge_l_is_the_packages_for_ascii_text():
    pairs = [
        ("Don't stop_me now, 2 times!", "don t stop me 2 TIMES"),
        ("A list: one, two; three.", "one - three - two"),
        ("", "nothing"),
    ]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(target, answer)["rougeL"].fmeasure for target, answer in pairs]
    targets, answers = zip(*pairs, strict=True)
    assert rouge_l(targets, answers) == pytest.approx(expected)


def test_rouge_l_keeps_letters_outside_ascii():
    assert rouge_l(["żółw śpi"], ["żółw śni"]) == [pytest.approx(0.5)]
    assert rouge_l(["привет мир"], ["привет"]) == [pytest.approx(2 / 3)]
