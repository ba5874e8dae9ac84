"""The report of an ensemble beside those of its members."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from oracles.slow import only
from softprompt.errors import ConfigError, TemplateError
from softprompt.evaluation import evaluate
from softprompt.inference import Ensemble

ROWS = [
    {"input": text, "output": label}
    for text, label in [
        ("fine work", "good"),
        ("never again, and I mean it", "poor"),
        ("ok", "so so"),
        ("it broke", "poor"),
        ("a b c d e f", "good"),
    ]
]


@pytest.fixture
def members(make_tuned):
    prompts = [make_tuned(), make_tuned(template="Q: {{input}} A:"), make_tuned()]
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        weight = prompt.module.embedding.weight
        weight.data = torch.randn(weight.shape, generator=generator)
    return prompts


@pytest.mark.parametrize(
    ("normalize", "combine"),
    only([(False, "mean"), (True, "vote")], itertools.product([False, True], ["mean", "vote"])),
)
def test_members_are_reported_as_if_alone(members, combine, normalize):
    ensemble = Ensemble(members, combine=combine, names=["a", "b", "c"])
    report = evaluate(ensemble, ROWS, normalize=normalize)
    assert report.combine == combine
    assert list(report.members) == ["a", "b", "c"]
    for own, member in zip(report.members.values(), members, strict=True):
        alone = evaluate(member, ROWS, normalize=normalize)
        assert own.perplexity == pytest.approx(alone.perplexity, rel=1e-4)
        assert dataclasses.replace(own, perplexity=alone.perplexity) == alone
    answers = ensemble.classify([row["input"] for row in ROWS], normalize=normalize)
    right = sum(a.label == r["output"] for a, r in zip(answers, ROWS, strict=True))
    assert report.accuracy == right / len(ROWS)
    assert report.perplexity is None


def test_the_report_as_json_and_as_text(members):
    report = evaluate(Ensemble(members, names=["first", "b", "c"]), ROWS)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["members"]["first"]["accuracy"] == report.members["first"].accuracy
    text = str(report)
    assert text.startswith("ensemble of 3 prompts by mean, classification, 5 rows")
    assert "  first   " in text
    assert evaluate(members[0], ROWS).to_dict()["members"] is None


def test_columns_that_the_members_name_differently_must_be_given(members):
    settings = {"input_field": "question", "output_field": "answer"}
    members[1].manifest = dataclasses.replace(members[1].manifest, settings=settings)
    ensemble = Ensemble(members)
    with pytest.raises(ConfigError, match=r"different input_fields \(None, question\); give input_f"):
        evaluate(ensemble, ROWS)
    assert evaluate(ensemble, ROWS, input_field="input", output_field="output").rows == 5


def test_what_an_ensemble_does_not_do(members, make_tuned):
    ensemble = Ensemble(members)
    with pytest.raises(ConfigError, match="generates no text"):
        evaluate(ensemble, ROWS, task="generation")
    with pytest.raises(ConfigError, match="name one prompt"):
        evaluate(ensemble, ROWS, without_prompt=True)
    for several in ({"task_name": ["a"] * len(ROWS)}, {"task_field": "task"}):
        with pytest.raises(ConfigError, match="an ensemble answers for one task at a time; give one task_name"):
            evaluate(ensemble, ROWS, **several)
    odd = make_tuned(template="{{title}}: {{input}}")
    with pytest.raises(TemplateError, match="title"):
        evaluate(Ensemble([members[0], odd]), ROWS)
