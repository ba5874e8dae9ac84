"""What a distillation's settings reach: the weight of given answers, how many tokens are kept, what is asked."""

from __future__ import annotations

import importlib

import pytest

import softprompt
from distillation.conftest import TEXT
from softprompt.backbone import freeze, load_base
from softprompt.distillation import (
    DistillSettings,
    Question,
    Store,
    Teacher,
    measure_distilled,
    measured_on,
    report_of,
)
from softprompt.distillation.texts import SourceText
from softprompt.generation import GenerationOptions

QUICK = {"num_virtual_tokens": 4, "max_source_length": 48, "max_target_length": 8, "max_steps": 1, "report": False}


@pytest.fixture
def objectives(monkeypatch):
    """Every loss of a distillation that was built."""
    student, built = importlib.import_module("softprompt.distillation.student"), []
    original = student.TopDivergence

    def remember(*given):
        built.append(original(*given))
        return built[-1]

    monkeypatch.setattr(student, "TopDivergence", remember)
    return built


def test_the_label_weight_is_that_of_given_answers_in_the_loss(chat_base, objectives):
    words = [{"input": "is it late", "output": "yes"}, {"input": "is it good"}, {"input": "why", "output": "late"}]
    asked = {"questions": words, "system_prompt": TEXT, "held_out": 0.0}
    prompts = [softprompt.distill(chat_base, label_weight=weight, **asked, **QUICK) for weight in (0.25, 1.0)]
    for weight, objective in zip((0.25, 1.0), objectives, strict=True):
        assert len(objective.taught) == 3
        assert len(objective.labels) == 2
        assert set(objective.labels.values()) == {weight}
        targets = {prompts[0].tokenizer.decode(target[:-1]).strip() for _, target in objective.labels}
        assert targets == {"yes", "late"}
    assert not prompts[0].prompt().input.equal(prompts[1].prompt().input)


def test_as_many_tokens_are_kept_as_top_k_says(chat_base, asked, objectives, monkeypatch, tmp_path):
    stored, save = [], Store.save_targets

    def remember(self, block, targets):
        stored.extend(each.ids.shape[1] for each in targets)
        save(self, block, targets)

    monkeypatch.setattr(Store, "save_targets", remember)
    options = {"system_prompt": TEXT, "questions": asked, "output": tmp_path / "out", "top_k": 3}
    softprompt.distill(chat_base, **options, **QUICK)
    (objective,) = objectives
    assert stored == [3] * len(asked)
    assert {each.ids.shape[1] for each in objective.taught.values()} == {3}
    again, kept = Teacher.targets, []
    monkeypatch.setattr(Teacher, "targets", lambda *given: kept.append(given[3]) or again(*given))
    measure_distilled(tmp_path / "out", system_prompt=TEXT)
    assert kept == [3]


def test_the_summary_is_asked_of_the_base_behind_each_passage(chat_base, monkeypatch):
    base, settings = load_base(chat_base), DistillSettings(max_source_length=48, max_target_length=8, self_study=1)
    freeze(base.model)
    teacher = Teacher.of(base, SourceText("document", [("a", TEXT), ("b", "We are closed. " * 9)]), settings)
    questions = [
        Question({"messages": [{"role": "user", "content": "late"}]}, "yes", n, labelled=True) for n in (0, 1)
    ]
    distilled = measured_on(teacher.with_ids(teacher.passages[0].ids[:10]), teacher, questions)
    asked = []

    def summary(self, given):
        asked.extend(given)
        return ["Late.", "We are closed all day, and all week, and all year, so call again."]

    monkeypatch.setattr(Teacher, "generate", summary)
    report = report_of(distilled, questions)
    text = "Summarise the text above in at most 7 words. Keep every rule, name and number that matters."
    assert [(each.text, each.passage, how) for each, how in asked] == [
        (text, n, GenerationOptions(max_new_tokens=10)) for n in (0, 1)
    ]
    (reader,) = [each for each in report.readers if "summary" in each.name]
    assert reader.name == "a summary, 10 tokens"
    assert reader.tokens == (len(teacher.rows.text("Late.")) + 10) / 2
