from __future__ import annotations

import math
import random
import sys

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from softprompt.evaluation.metrics import LabelRow, calibration_error, label_metrics, rouge_l, text_metrics

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


@pytest.fixture(scope="module")
def predictions():
    draw = random.Random(5)
    gold = [draw.choice("abc") for _ in range(150)]
    return gold, [label if draw.random() < 0.7 else draw.choice("abc") for label in gold]


def test_mcc_by_its_definition():
    found = label_metrics(["a", "a", "a", "b", "b", "b"], ["a", "a", "b", "b", "b", "a"], ["a", "b"])
    true_a, true_b, false_a, false_b = 2, 2, 1, 1
    wide = (true_a + false_a) * (true_a + false_b) * (true_b + false_a) * (true_b + false_b)
    assert found.mcc == pytest.approx((true_a * true_b - false_a * false_b) / math.sqrt(wide))
    assert label_metrics(["a", "a"], ["a", "a"], ["a", "b"]).mcc == 0


def test_intervals_are_those_of_a_slow_bootstrap_with_scikit_learn(predictions):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    gold, predicted = map(np.array, predictions)
    draw = np.random.default_rng(1)
    resamples = [draw.integers(0, len(gold), len(gold)) for _ in range(100)]
    slow = {
        "accuracy": [accuracy_score(gold[each], predicted[each]) for each in resamples],
        "macro_f1": [f1_score(gold[each], predicted[each], average="macro") for each in resamples],
        "mcc": [matthews_corrcoef(gold[each], predicted[each]) for each in resamples],
    }
    found = label_metrics(gold.tolist(), predicted.tolist(), ["a", "b", "c"])
    assert set(found.intervals) == set(slow)
    for name, values in slow.items():
        assert found.intervals[name] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.03)
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high


def test_the_same_records_have_the_same_intervals_and_one_has_none(predictions):
    gold, predicted = predictions
    assert label_metrics(gold, predicted, "abc").intervals == label_metrics(gold, predicted, "abc").intervals
    assert label_metrics(["a"], ["b"], "ab").intervals == {}
    assert text_metrics(["a"], ["b"]).intervals == {}


def test_the_statistic_of_a_resample_is_scikit_learns(predictions):
    """The bootstrap computes F1 and MCC from counts; on records that are all alike there is one resample only."""
    alike = label_metrics(["a"] * 9, ["a"] * 9, ["a", "b"])
    assert alike.intervals == {"accuracy": (1, 1), "macro_f1": (1, 1), "mcc": (0, 0)}


def test_calibration_error_by_its_definition(predictions):
    draw = random.Random(7)
    sure = [draw.random() for _ in range(200)] + [0.0, 1.0, 2 / 15]
    right = [draw.random() < each for each in sure]
    expected = 0.0
    for k in range(15):
        inside = [i for i, each in enumerate(sure) if k / 15 < each <= (k + 1) / 15 or (k == 0 and each == 0)]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(sure[i] for i in inside) / len(inside)
            expected += len(inside) / len(sure) * abs(accuracy - confidence)
    assert calibration_error(sure, right) == pytest.approx(expected)
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration_error([0.75, 0.75], [True, False]) == pytest.approx(0.25)


def test_bleu_and_chrf_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    targets = ["The cat sat on the mat today .", "It rains in the north of the country."]
    answers = ["The cat sat on a mat today .", "It rains in the north of our country."]
    found = text_metrics(targets, answers)
    assert found.bleu == pytest.approx(sacrebleu.corpus_bleu(answers, [targets], force=True).score)
    assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(answers, [targets]).score)
    assert 0 < found.bleu < 100


def test_without_sacrebleu_there_is_neither(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    found = text_metrics(["a b"], ["a b"])
    assert (found.bleu, found.chrf, found.rouge_l) == (None, None, 1)
