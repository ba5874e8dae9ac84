"""The tokens that a teacher runs: as reckoned for a report, and as they pass through the base."""

from __future__ import annotations

import pytest

from distillation.conftest import TEXT
from softprompt.backbone import freeze, load_base
from softprompt.distillation import (
    DistillSettings,
    Question,
    Store,
    Teacher,
    measured_on,
    questions,
    report_of,
    stages,
    tokens_read,
)
from softprompt.distillation.texts import SourceText
from softprompt.generation import Bounds

LONG = "The parcel service is late again, and nobody answers. " * 9
OTHER = "We sell tents and boots; write to us before noon. " * 6
BOTH = SourceText("document", [("long", LONG), ("other", OTHER)])
WORDS = ("late", "good", "where is it", "a tent", "boots", "service", "noon", "why", "nobody")
QUICK = {"num_virtual_tokens": 4, "max_source_length": 48, "max_target_length": 8, "batch_size": 2, "self_study": 9}


def teacher_of(base_model, reading, **options):
    base, settings = load_base(base_model), DistillSettings.from_dict({**QUICK, **options})
    freeze(base.model)
    return Teacher.of(base, reading, settings), settings


def asked(labelled=False, chat=True):
    answer = "yes it is" if labelled else None
    requests = [questions.request_of(word, chat=chat) for word in WORDS]
    return [Question(each, answer, chat and n % 2, labelled=labelled) for n, each in enumerate(requests)]


def run_by(teacher, find):
    """Return the questions of a stage, and the tokens that pass the first layer for them and their targets."""
    passes, keep = [], Store(None, {})

    def work():
        teacher.__dict__.pop("_decoder", None)  # it keeps what it has read
        found = find(keep)
        rows = teacher.rows.tokenize([each.record(chat=teacher.manifest.chat) for each in found])[0]
        stages.taught(found, rows, 5, teacher, keep, lambda: None)
        return found

    work()  # with the probes of the engine
    layer = teacher.base.model.model.layers[0].mlp
    hook = layer.register_forward_pre_hook(lambda module, given: passes.append(given[0][..., 0].numel()))
    found = work()
    hook.remove()
    return found, sum(passes)


def answered(teacher, given):
    return run_by(teacher, lambda keep: stages.answered(given, teacher, keep, lambda: None))


def about(tokens):
    """As many, or a few more: beginnings that rows share behind the text are run once."""
    return pytest.approx(1.03 * tokens, rel=0.03)


def test_self_study_asks_answers_and_predicts_behind_each_passage(chat_base, monkeypatch):
    monkeypatch.setattr(questions, "_NEW", 12)
    for module in (questions, stages):
        monkeypatch.setattr(module, "problem", lambda text: "")
    teacher, settings = teacher_of(chat_base, BOTH, held_out=0.2)
    found, tokens = run_by(teacher, lambda keep: stages.studied(settings, teacher, keep, lambda: None))
    assert {each.passage for each in found} == {0, 1}
    assert tokens_read(found, teacher) == about(tokens)


@pytest.mark.parametrize("labelled", [False, True])
def test_given_questions_are_answered_where_they_have_no_answer(chat_base, labelled):
    teacher, _ = teacher_of(chat_base, BOTH)
    found, tokens = answered(teacher, asked(labelled))
    assert tokens_read(found, teacher) == about(tokens)


def test_passages_without_room_are_run_for_each_answer(chat_base, monkeypatch):
    teacher, _ = teacher_of(chat_base, BOTH)
    given = asked()
    once = tokens_read(given, teacher)
    monkeypatch.setattr(stages, "Bounds", lambda: Bounds(max_prompts_resident=1))
    at = teacher.rows.tokenize([given[0].record(chat=True)])[0][0].at
    assert tokens_read(given, teacher) - once == sum(
        n * (at + each.tokens) for n, each in zip((4, 3), teacher.prompts, strict=True)
    )


@pytest.mark.slow
def test_labels_are_scored_for_every_question():
    examples = [({"input": f"text {n} of the sort"}, ("good", "bad")[n % 2]) for n in range(30)]
    options = {"task": "classification", "verbalizer": "Text: {{input}}\nLabel:"}
    teacher, _ = teacher_of("demo", SourceText("examples", examples=examples), **options)
    found, tokens = answered(teacher, asked(chat=False))
    assert tokens_read(found, teacher) == about(tokens)


def test_the_report_adds_what_was_trained_on_twice(chat_base):
    teacher, _ = teacher_of(chat_base, SourceText("system prompt", [("text", TEXT)]))
    tuned, given = teacher.with_ids(teacher.passages[0].ids[:4]), asked(labelled=True)[::2]
    distilled = measured_on(tuned, teacher, given[:1])
    tuned.manifest.metrics.update(tokens_per_second=10.0, seconds_by_part={"training": 3.0})
    found = report_of(distilled, given)
    assert found.tokens_read == 60 + tokens_read(given, teacher)
    assert found.requests_to_pay == found.tokens_read / found.tokens_saved
