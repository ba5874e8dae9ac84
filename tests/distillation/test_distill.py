"""A text into a prompt: the teacher against plain passes, the student against no prompt, the text, and PEFT."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import softprompt
from distillation.conftest import TEXT
from oracles import families
from oracles.serving import write_prompt
from oracles.tokenizers import byte_bpe
from softprompt.backbone import Base, freeze, key_values, load_base
from softprompt.distillation import (
    TEXT_RATE_PER_RMS,
    DistillSettings,
    Question,
    Teacher,
    divergence_of,
    measure_distilled,
    questions,
)
from softprompt.distillation.held_out import HeldOut
from softprompt.distillation.student import Student
from softprompt.distillation.texts import SourceText, start_ids
from softprompt.errors import ContextOverflowError, SoftPromptError, UsageError
from softprompt.evaluation import EvaluationSettings
from softprompt.evaluation.baselines import Baseline, prompted
from softprompt.prompts import Placement

# PEFT 0.21 reads a property that transformers 5.23 has renamed; nothing of ours is involved.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QUICK = {"num_virtual_tokens": 4, "max_source_length": 48, "max_target_length": 8, "silence_progress_bars": True}


def teacher_of(base_model, reading, **settings):
    base = load_base(base_model)
    freeze(base.model)
    return Teacher.of(base, reading, DistillSettings.from_dict({**QUICK, **settings}))


def targets_of(teacher, question, answer):
    """The teacher's top 5 for an answer, and that of a plain pass over text, question and answer."""
    found = Question(question, answer)
    rows, _ = teacher.rows.tokenize([found.record(chat=teacher.manifest.chat)])
    return rows[0], teacher.targets([found], rows, 5, lambda: None)[0]


def plain_top(model, ids, behind):
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0, -behind - 1 : -1].log_softmax(1)
    return scores.topk(5)


def test_the_teachers_targets_are_those_of_a_plain_pass_over_a_chat(chat_base):
    teacher = teacher_of(chat_base, SourceText("system prompt", [("text", TEXT)]))
    row, found = targets_of(teacher, {"messages": [{"role": "user", "content": "is it late"}]}, "thank you")
    tokenizer, model = AutoTokenizer.from_pretrained(chat_base), AutoModelForCausalLM.from_pretrained(chat_base)
    turns = [("system", TEXT), ("user", "is it late"), ("assistant", "thank you")]
    chat = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    wanted = plain_top(model, tokenizer(text, add_special_tokens=False)["input_ids"], len(row.target))
    torch.testing.assert_close(found.log_probs, wanted.values, atol=2e-4, rtol=1e-4)
    assert torch.equal(found.ids.long(), wanted.indices)
    torch.testing.assert_close(found.tail.exp(), 1 - wanted.values.exp().sum(1), atol=1e-4, rtol=1e-4)


def test_the_teachers_targets_are_those_of_a_plain_pass_over_a_text():
    teacher = teacher_of(
        "demo", SourceText("system prompt", [("text", TEXT)]), verbalizer="Text: {{input}}\nLabel:"
    )
    row, found = targets_of(teacher, {"input": "is it late"}, "yes")
    tokenizer, model = teacher.base.tokenizer, teacher.base.model
    bos = tokenizer("", add_special_tokens=True)["input_ids"][: row.at]
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = [*bos, *text, *teacher.rows.text("\n\n"), *row.source[row.at :], *row.target]
    wanted = plain_top(model, ids, len(row.target))
    torch.testing.assert_close(found.log_probs, wanted.values, atol=2e-4, rtol=1e-4)


def test_examples_are_shown_as_the_baseline_of_an_evaluation_shows_them():
    records = [{"input": f"text {n}", "output": ("good", "bad")[n % 2]} for n in range(4)]
    template = "Text: {{input}}\nLabel:"
    teacher = teacher_of(
        "demo", SourceText.of(None, (), records, {"input_field": None, "output_field": None}), verbalizer=template
    )
    baseline = Baseline(base_model="demo", template=template, few_shot=4, examples=records, labels=("bad", "good"))
    shown, _ = prompted(baseline, [], EvaluationSettings())
    texts = {tuned.tokenizer.decode(ids) for tuned, ids in ((shown, teacher.passages[0].ids),)}
    (text,) = texts
    assert sorted(text.split("\n\n")) == sorted(
        f"Text: text {n}\nLabel: {('good', 'bad')[n % 2]}" for n in range(4)
    )
    assert teacher.prompts[0].tokens == shown.prompt().tokens
    assert teacher.manifest.labels == ("bad", "good")
    (answered,) = teacher.answered([Question({"input": "text 1"}, None)])
    assert set(answered.scores) == {"bad", "good"}
    assert answered.answer == max(answered.scores, key=answered.scores.get)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The demo model's few-shot text in a prompt, and where it lies."""
    output = tmp_path_factory.mktemp("distilled") / "prompt"
    text = "Text: It broke.\nLabel: complaint\n\nText: When do you open?\nLabel: no complaint"
    words = ["kettle", "lamp", "chair", "phone", "book", "coat", "lock", "shoe"]
    asked = [{"input": f"The {one} {what}."} for one in words for what in ("leaks", "is nice")]
    tuned = softprompt.distill(
        system_prompt=text,
        questions=asked,
        verbalizer="Text: {{input}}\nLabel:",
        num_epochs=6,
        batch_size=8,
        start="vocabulary",
        output=output,
        held_out=0.25,
        **QUICK,
    )
    return tuned, output, text


def test_the_prompt_comes_clearly_nearer_to_the_text_than_no_prompt(distilled):
    tuned, output, text = distilled
    both = [(output / name).read_text().splitlines() for name in ("questions.jsonl", "held_out.jsonl")]
    assert list(map(len, both)) == [12, 4]
    apart = [Question.of_record(json.loads(line), {"input_field": None, "output_field": None}) for line in both[1]]
    assert all(each.held_out and each.answer for each in apart)
    teacher = teacher_of("demo", SourceText("system prompt", [("text", text)]), verbalizer=tuned.manifest.template)
    records = [each.record(chat=False) for each in apart]
    asked, rows = teacher.rows.tokenize(records)[0], tuned.rows.tokenize(records)[0]
    kept = HeldOut(apart, asked, rows, teacher.targets(apart, asked, 20, lambda: None))
    nats = [
        divergence_of(tuned.engine, each, kept.targets, batch_size=4)
        for each in (kept.with_prompt(None), kept.with_prompt(tuned.prompt()), kept.with_text(teacher.prompts))
    ]
    assert nats[1].nats < 0.5 * nats[0].nats
    assert nats[2].nats == pytest.approx(0.0, abs=1e-5)
    assert nats[2].agreement == 1.0
    assert nats[1].nats == pytest.approx(tuned.metrics["validation"]["divergence"], rel=1e-3)


def test_the_artifact_is_pefts_and_nothing_of_the_run_is_left(distilled):
    tuned, output, _ = distilled
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    assert not (output / ".state").exists()
    ids = torch.tensor([tuned.sources("The door sticks.")[0][0]])
    model = AutoModelForCausalLM.from_pretrained(tuned.base.model.name_or_path)
    theirs = peft.PeftModel.from_pretrained(model, str(output)).eval()
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        embeds = torch.cat([tuned.prompt().input, tuned.base.embedding(ids[0])])
        found = tuned.base.model(inputs_embeds=embeds[None]).logits[0, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    again = softprompt.load(output)
    assert again("The door sticks.") == tuned("The door sticks.")
    assert again.manifest.settings["distillation"]["start"] == "vocabulary"


def test_a_chat_prompt_stands_where_the_text_stood(chat_base, asked):
    tuned = softprompt.distill(chat_base, system_prompt=TEXT, questions=asked, max_steps=2, **QUICK)
    assert tuned.config.placement is Placement.CHAT_SYSTEM
    assert tuned.manifest.chat
    teacher = teacher_of(chat_base, SourceText("system prompt", [("text", TEXT)]))
    assert tuned.sources("is it late") == teacher.tuned[0].sources("is it late")
    in_front = softprompt.distill(
        chat_base, system_prompt=TEXT, questions=asked, max_steps=2, placement="prefix", **QUICK
    )
    assert str(in_front.config.peft_type) == "PROMPT_TUNING"


def test_kv_starts_at_the_texts_own_keys_and_values_and_is_pefts_cartridge(chat_base, asked, tmp_path):
    teacher = teacher_of(chat_base, SourceText("system prompt", [("text", TEXT)]), kind="kv")
    settings = DistillSettings.from_dict({**QUICK, "kind": "kv"})
    answered = [Question({"messages": [{"role": "user", "content": "late"}]}, "thank you")]
    student = Student.of(teacher, answered, settings, {"train": {"path": "x", "sha256": "y", "rows": 1}})
    head = student.asked[0].source[: student.asked[0].at]
    ids = [*head, *teacher.passages[0].ids][:4]
    wanted = key_values(teacher.base.model, ids)
    torch.testing.assert_close(student.prepared.module.prompt().prefix, wanted)
    tuned = softprompt.distill(
        chat_base, system_prompt=TEXT, questions=asked, max_steps=2, kind="kv", output=tmp_path / "kv", **QUICK
    )
    moved = (tuned.prompt().prefix - wanted).abs().amax(dim=(0, 1, 2, 4))
    assert moved[0] == 0  # the sink stays
    rate = TEXT_RATE_PER_RMS * student.prepared.rates.rms
    assert tuned.metrics["learning_rate"] == pytest.approx(rate)
    assert (moved[1:] > 0).all()
    assert softprompt.load(tmp_path / "kv")("is it late") == tuned("is it late")
    config = json.loads((tmp_path / "kv" / "adapter_config.json").read_text())
    assert config["peft_type"] == "CARTRIDGE"
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_base), str(tmp_path / "kv"))
    assert loaded.peft_config["default"].num_virtual_tokens == 4


def test_keys_and_values_of_any_tokens_learn_at_tunes_own_rate(chat_base):
    teacher = teacher_of(chat_base, SourceText("system prompt", [("text", TEXT)]))
    answered = [Question({"messages": [{"role": "user", "content": "late"}]}, "thank you")]
    rates = {}
    for start in ("text", "chunks", "vocabulary"):
        settings = DistillSettings.from_dict({**QUICK, "kind": "kv", "start": start})
        rates[start] = Student.of(teacher, answered, settings, {}).prepared.rates
    rms = rates["text"].rms
    assert [each.prompt for each in rates.values()] == pytest.approx([0.06 * rms, 0.06 * rms, 0.2 * rms])
    assert [each.usual for each in rates.values()] == [each.prompt for each in rates.values()]
    given = DistillSettings.from_dict({**QUICK, "kind": "kv", "learning_rate": 0.01})
    assert Student.of(teacher, answered, given, {}).prepared.rates.prompt == 0.01


def test_a_document_is_cut_into_equal_chunks_that_are_the_whole(chat_base):
    text = " ".join(f"fact {n}" for n in range(90))
    reading = SourceText("document", [("a.txt", text), ("b.txt", TEXT)])
    teacher = teacher_of(chat_base, reading, chunk_tokens=100)
    sizes = [len(each.ids) for each in teacher.passages]
    whole = [token for each in teacher.passages for token in each.ids]
    split = [teacher.base.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, TEXT)]
    assert whole == [*split[0], *split[1]]
    assert max(sizes) <= 100
    assert max(sizes[:-1]) - min(sizes[:-1]) <= 1
    assert teacher.passages[0].source == f"a.txt, chunk 1 of {len(sizes) - 1}"
    assert [each.number for each in teacher.passages] == list(range(len(sizes)))
    assert start_ids("text", teacher.passages, 5, 330, 0) == whole[:5]
    pieces = start_ids("chunks", teacher.passages, 20, 330, 0)
    assert len(pieces) == 20
    text_of = " ".join(map(str, whole))
    assert all(" ".join(map(str, pieces[i : i + 8])) in text_of for i in (0, 8))


def test_a_question_names_its_passage_and_only_the_student_cannot_see_it(chat_base):
    texts = ["The first parcel is late.", "The second one is good."]
    teacher = teacher_of(chat_base, SourceText("document", [(str(n), text) for n, text in enumerate(texts)]))
    records = [{"input": "late", "passage": 2}, {"input": "good", "passage": 1}, {"input": "late", "passage": 1}]
    found = questions.given_questions(records, teacher.rows, 2, DistillSettings(held_out=0.0, self_study=1))
    assert [each.passage for each in found] == [1, 0]  # one question has one teacher
    alone = [teacher_of(chat_base, SourceText("system prompt", [("", text)])) for text in texts]
    rows = [teacher.rows.tokenize([replace(each, answer="yes").record(chat=True)])[0][0] for each in found]
    both = teacher.targets(found, rows, 5, lambda: None)
    for each, row, targets in zip(found, rows, both, strict=True):
        (wanted,) = alone[each.passage].targets([replace(each, passage=0)], [row], 5, lambda: None)
        torch.testing.assert_close(targets.log_probs, wanted.log_probs, atol=2e-4, rtol=1e-4)


def test_the_first_question_need_not_have_an_answer_and_a_template_may_name_a_passage():
    template = "{{passage}} {{input}}?"
    teacher = teacher_of("demo", SourceText("system prompt", [("text", TEXT)]), verbalizer=template)
    records = [{"input": "a", "passage": "p"}, {"input": "b", "passage": "q", "output": "yes"}]
    settings = DistillSettings(held_out=0.0, self_study=1, verbalizer=template)
    found = questions.given_questions(records, teacher.rows, 1, settings)
    assert [(each.answer, each.labelled) for each in found] == [(None, False), ("yes", True)]
    assert found[1].request == {"input": "b", "passage": "q"}


@pytest.mark.slow
def test_self_study_keeps_other_kinds_apart_and_is_the_same_again(chat_base, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "_NEW", 12)
    options = {"documents": [TEXT], "self_study": 5, "held_out": 0.4, "max_steps": 1, **QUICK}
    runs = [softprompt.distill(chat_base, output=tmp_path / name, **options) for name in "ab"]
    trained, apart = (
        [json.loads(line) for line in (tmp_path / "a" / name).read_text().splitlines()]
        for name in ("questions.jsonl", "held_out.jsonl")
    )
    assert {each["distillation"]["kind"] for each in apart} == {*questions.OTHER_SEEDS}
    assert {each["distillation"]["kind"] for each in trained} <= {*questions.SEEDS}
    assert [each["role"] for each in trained[0]["messages"]] == ["user", "assistant"]
    assert torch.equal(runs[0].prompt().input, runs[1].prompt().input)
    assert runs[0].manifest.data == runs[1].manifest.data
    assert [runs[0].manifest.data[use]["rows"] for use in ("train", "validation")] == [5, 2]
    assert "divergence" in runs[0].metrics["validation"]


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(chat_base, tmp_path):
    found = softprompt.distill(
        chat_base, documents=[TEXT], self_study=12, max_steps=9, dry_run=True, output=tmp_path / "new", **QUICK
    )
    assert (found.questions, found.held_out, found.generated, found.training.steps) == (12, 1, 26, 9)
    assert set(found.seconds) == {"questions", "teacher", "training"}
    assert f"{found.text_tokens:,} tokens" in str(found)
    assert json.dumps(found.to_dict())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"system_prompt": TEXT}, "expected questions=... .* or self_study=N"),
        ({"system_prompt": TEXT, "questions": [{"input": "a"}], "self_study": 2}, "give one of them"),
        ({"self_study": 2}, "one of system_prompt=..., documents=..., examples=... to distil, got none"),
        (
            {"system_prompt": TEXT, "documents": [TEXT], "self_study": 2},
            "got system_prompt=... and documents=...;",
        ),
        ({"system_prompt": " \n", "self_study": 2}, "the system prompt is empty"),
        (
            {"system_prompt": TEXT, "self_study": 2, "num_virtual_tokens": 300},
            "num_virtual_tokens 300 is more than",
        ),
        ({"system_prompt": TEXT * 30, "self_study": 2}, "does? not fit|has room for .*as a document"),
        ({"system_prompt": TEXT, "self_study": 2, "chunk_tokens": 64}, "chunk_tokens would be ignored"),
        ({"documents": [TEXT], "self_study": 2, "chunk_tokens": 4000, "top_k": 0}, "top_k must be at least 1"),
        ({"examples": [{"input": "a"}], "self_study": 2}, "expected the fields input and output"),
        ({"system_prompt": TEXT, "questions": []}, "at least one record"),
        (
            {"system_prompt": TEXT, "self_study": 2, "kind": "kv", "placement": "prefix"},
            "placement would be ignored",
        ),
        ({"system_prompt": TEXT, "self_study": 2, "learning": 1}, "unknown setting 'learning'"),
        ({"system_prompt": TEXT, "self_study": 2, "lr": 1, "learning_rate": 2}, "are the same setting; give one"),
        (
            {"system_prompt": TEXT, "self_study": 2, "early_stopping_patience": 1, "held_out": 0},
            "early_stopping_patience needs held_out questions to validate on; raise held_out",
        ),
        ({"resume": True}, "resume needs the output directory of the interrupted run"),
        ({"documents": [TEXT * 30], "questions": [{"input": "a"}]}, "number of one in the column 'passage'"),
        (
            {"examples": [{"input": "a", "output": "b"}] * 9, "self_study": 2, "chat": True, "kind": "kv"},
            "leave chat out",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(chat_base, given, says):
    with pytest.raises(SoftPromptError, match=says) as error:
        softprompt.distill(chat_base, **{**QUICK, **given})
    assert "\n" not in str(error.value)


def test_a_base_with_an_encoder_is_refused():
    base = Base(families.tiny("t5"), byte_bpe(), "t5")
    with pytest.raises(SoftPromptError, match="causal language model"):
        softprompt.distill(base, system_prompt=TEXT, self_study=2, **QUICK)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_virtual_tokens": 300}, "num_virtual_tokens 300 is more than"),
        ({"kind": "kv", "distractors": ["nonesuch"]}, "nonesuch does not exist"),
        ({"unrelated": "nonesuch.jsonl"}, "no such data file"),
        (
            {
                "unrelated": [
                    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
                ]
            },
            "1: expected a text",
        ),
        ({"verbalizer": "{{a}} {{b}}", "chat": False}, "one field is input"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_written(chat_base, tmp_path, given, says):
    with pytest.raises(SoftPromptError, match=says):
        softprompt.distill(
            chat_base, system_prompt=TEXT, self_study=2, output=tmp_path / "out", **{**QUICK, **given}
        )
    assert not (tmp_path / "out").exists()


def test_a_document_that_is_no_text_is_refused(chat_base, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(SoftPromptError, match=r"latin\.txt is not UTF-8 .*; convert it first"):
        softprompt.distill(chat_base, documents=[tmp_path / "latin.txt"], self_study=2, **QUICK)


def test_a_prompt_that_was_not_distilled_is_not_measured(tmp_path):
    write_prompt(tmp_path / "trained", load_base("demo"))
    with pytest.raises(SoftPromptError, match="trained was not made by distill; evaluate measures other prompts"):
        measure_distilled(tmp_path / "trained", system_prompt=TEXT)


def test_a_question_may_be_a_chat_with_its_tools(chat_base):
    teacher = teacher_of(chat_base, SourceText("system prompt", [("text", TEXT)]))
    turns = [{"role": "user", "content": "is it late"}, {"role": "assistant", "content": "yes"}]
    tools = [{"type": "function", "function": {"name": "find"}}]
    other = [{"role": "user", "content": "is it good"}]
    records = [{"messages": turns}, {"messages": turns[:1]}, {"messages": other, "tools": tools}]
    settings = DistillSettings(held_out=0.0, self_study=1)
    found = questions.given_questions(records, teacher.rows, 1, settings)
    assert [each.request for each in found] == [{"messages": turns[:1]}, {"messages": other, "tools": tools}]
    assert [(each.answer, each.labelled) for each in found] == [("yes", True), (None, False)]


def test_what_a_base_asks_itself_is_kept_once_and_only_where_it_says_something():
    settings = DistillSettings(self_study=9, held_out=0.0)
    study = questions.Study.of(settings, False, 1)
    seeds = [each for each, _ in study.wanted(5)]
    texts = ["Is it late?", '"is it LATE"', " \n", "late " * 40, "Who answers?"]
    kept = study.kept(seeds, texts)
    assert [each.request for each in kept] == [{"input": "Is it late?"}, {"input": "Who answers?"}]
    study.add([replace(kept[0], answer="yes"), replace(kept[1], answer="")])
    assert [each.answer for each in study.questions] == ["yes"]
    assert study.dropped == {
        "questions asked before": 1,
        "questions empty": 1,
        "questions repetitive": 1,
        "answers empty": 1,
    }
    assert study.kept(seeds[:1], ["is it late!"]) == []


@pytest.mark.parametrize("kind", ["questions", "self_study"])
def test_a_base_that_says_nothing_leaves_nothing_to_train_on(chat_base, asked, monkeypatch, caplog, kind):
    def silent(self, given):
        return [replace(each, answer="") for each in given]

    monkeypatch.setattr(Teacher, "answered", silent)
    monkeypatch.setattr(Teacher, "generate", lambda self, given: ["Is it late?"] * len(given))
    given = {"questions": asked} if kind == "questions" else {"self_study": 2}
    with (
        caplog.at_level("INFO", "softprompt"),
        pytest.raises(SoftPromptError, match="no question is left to train"),
    ):
        softprompt.distill(chat_base, system_prompt=TEXT, **given, **QUICK)
    (left_out,) = [each for each in caplog.messages if each.startswith("left out: ")]
    assert "answers empty" in left_out
    assert ("self-study found 0 of 3 questions" in caplog.messages) == (kind == "self_study")


def test_what_learnt_nothing_and_what_cannot_be_reported_on_is_said(chat_base, asked, caplog):
    still = {"learning_rate": 1e-12, "num_epochs": 2, "held_out": 0.0}
    tuned = softprompt.distill(chat_base, system_prompt=TEXT, questions=asked, **still, **QUICK)
    assert "no question with a usable answer was kept apart to report on; raise held_out" in caplog.messages
    assert tuned.metrics["nothing_learnt"] in caplog.messages
    assert tuned.metrics["nothing_learnt"].startswith("the prompt learnt nothing: the loss went from ")
    apart = softprompt.distill(chat_base, system_prompt=TEXT, questions=asked, **still | {"held_out": 0.3}, **QUICK)
    assert apart.metrics["epoch"] > 0  # what hardly moved is no worse than its start
    assert apart.metrics["nothing_learnt"].startswith("the prompt learnt nothing: the loss went from ")
    column = [each | {"distillation": "x"} for each in asked]
    with pytest.raises(SoftPromptError, match="a column 'distillation', which a run's own files use"):
        softprompt.distill(chat_base, system_prompt=TEXT, questions=column, **still, **QUICK)


def test_a_prompt_that_training_made_worse_is_kept_as_it_started(chat_base, asked, tmp_path, caplog):
    wild = {"learning_rate": 50.0, "max_steps": 3, "held_out": 0.3, "verbalizer": "Q: {{input}}\nA:", "chat": False}
    tuned = softprompt.distill(
        chat_base, system_prompt=TEXT, questions=asked, output=tmp_path / "new", **wild, **QUICK
    )
    assert tuned.metrics["epoch"] == 0
    ids = tuned.tokenizer(TEXT, add_special_tokens=False)["input_ids"][: QUICK["num_virtual_tokens"]]
    assert torch.equal(tuned.prompt().input, tuned.base.embedding(torch.tensor(ids)))
    kept, worst = tuned.metrics["validation"]["divergence"], tuned.history[-1]["validation"]["divergence"]
    assert kept < worst
    assert f"kept as it started, {kept:.4f} nats from the text" in tuned.metrics["nothing_learnt"]
    assert tuned.metrics["nothing_learnt"] in caplog.messages
    assert torch.equal(softprompt.load(tmp_path / "new").prompt().input, tuned.prompt().input)
    report = json.loads((tmp_path / "new" / "distillation.json").read_text())
    nats = {each["name"]: each["nats"] for each in report["readers"]}
    assert nats["the prompt"] == pytest.approx(kept, rel=1e-3)
    assert "collapse" not in tuned.metrics
    assert tuned.metrics["start"] == tuned.metrics["validation"]
    assert "but the prompt was kept as it started" in str(softprompt.inspect_prompt(tuned))


def test_little_movement_is_no_bad_sign_where_a_prompt_starts_as_its_text(chat_base, asked):
    slow = {"learning_rate": 1e-4, "max_steps": 12, "num_epochs": 12, "batch_size": 8}
    tuned = softprompt.distill(chat_base, system_prompt=TEXT, questions=asked, **slow, **QUICK)
    assert not any("barely moved" in each for each in tuned.metrics.get("collapse", []))


def test_what_the_context_has_no_room_for_is_refused_before_anything_is_asked(chat_base, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "generate", None)
    long = {"documents": [TEXT * 60], "self_study": 2, "num_virtual_tokens": 500, "silence_progress_bars": True}
    with pytest.raises(ContextOverflowError, match=r"num_virtual_tokens 500, max_source_length 48 and max_target"):
        softprompt.distill(chat_base, output=tmp_path / "new", **long, max_source_length=48, max_target_length=8)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "request_",
    [
        {"input": "Is it late?"},
        {"input": "Is it late?", "q": "Is it late?", "shop": "North"},
        {"messages": [{"role": "user", "content": "Is it late?"}], "tools": [{"name": "clock"}]},
    ],
)
def test_a_question_is_read_as_it_was_written_now_and_by_earlier_versions(request_):
    columns = {"input_field": "q", "output_field": None}
    whole = Question(request_, "yes", 2, "given", labelled=True, held_out=True, scores={"yes": -0.1, "no": -2.0})
    record = json.loads(json.dumps(whole.to_record(columns)))
    assert Question.of_record(record, columns) == whole
    assert Question.of_record(json.loads(json.dumps(asdict(whole))), columns) == whole
    assert ("messages" in record) != (record.get("output") == "yes")
    assert "input" not in record or "q" not in record


def test_the_questions_of_a_run_are_data_for_other_commands(chat_base, tmp_path):
    rows = [{"q": f"Is parcel {n} late?", "a": ("yes", "no")[n % 2]} for n in range(6)]
    common = {"verbalizer": "Q: {{q}}\nA:", "input_field": "q", "output_field": "a", "chat": False, "max_steps": 1}
    softprompt.distill(
        chat_base, system_prompt=TEXT, questions=rows, output=tmp_path / "p", held_out=0.5, **common, **QUICK
    )
    found = softprompt.evaluate(
        softprompt.load(tmp_path / "p"), tmp_path / "p" / "held_out.jsonl", silence_progress_bars=True
    )
    assert sorted(each.target for each in found.outcomes) == sorted(
        rows[each]["a"] for each in range(6) if rows[each]["q"] in {one.fields["q"] for one in found.outcomes}
    )
    assert found.rows == 3
    again = measure_distilled(tmp_path / "p", system_prompt=TEXT)
    assert again.questions == 3
    other = [{"text": "Is it late?", "said": "yes", "q": "Is it?"}]
    named = measure_distilled(
        tmp_path / "p", system_prompt=TEXT, questions=other, input_field="text", output_field="said"
    )
    assert named.questions == 1


def test_a_base_that_answers_nothing_kept_apart_is_not_told_to_keep_more_apart(
    chat_base, asked, monkeypatch, caplog
):
    def half_silent(self, given):
        return [replace(each, answer="" if each.held_out else "yes") for each in given]

    monkeypatch.setattr(Teacher, "answered", half_silent)
    softprompt.distill(chat_base, system_prompt=TEXT, questions=asked, max_steps=1, **QUICK)
    (said,) = [each for each in caplog.messages if "to report on" in each]
    assert said.endswith("; give more questions=..., with answers where the base gives none")


def test_overwrite_without_output_is_refused(chat_base):
    with pytest.raises(UsageError, match="overwrite has no meaning"):
        softprompt.distill(chat_base, system_prompt=TEXT, self_study=2, overwrite=True)


def labelled_run(**options):
    """A distillation of four examples with labels, of six questions without answers."""
    examples = [{"input": f"text {n}", "output": ("good", "bad")[n % 2]} for n in range(4)]
    how = {"verbalizer": "Text: {{input}}\nLabel:", "task": "classification", "num_epochs": 1, "report": False}
    asked = [{"input": f"the {word}"} for word in ("kettle", "lamp", "chair", "phone", "book", "coat")]
    return softprompt.distill("demo", **{"examples": examples, "questions": asked, **QUICK, **how, **options})


def test_the_choice_among_labels_is_learnt_unless_its_weight_is_zero():
    chosen, alone = labelled_run(), labelled_run(choice_weight=0)
    assert not torch.equal(chosen.module.materialize(), alone.module.materialize())


def test_a_dry_run_of_labels_takes_their_answers(tmp_path):
    found = labelled_run(dry_run=True, output=tmp_path / "new", held_out=0.2)
    assert (found.questions, found.held_out, found.training.steps) == (5, 1, 1)
    assert not (tmp_path / "new").exists()


def test_a_given_answer_that_is_no_label_is_refused_before_the_teacher_reads():
    with pytest.raises(SoftPromptError, match="question 2: 'neutral' is not among the 2 labels of the exam"):
        labelled_run(questions=[{"input": "a", "output": "good"}, {"input": "b", "output": "neutral"}])


def test_a_choice_without_labels_is_refused():
    with pytest.raises(SoftPromptError, match="choice_weight would be ignored"):
        softprompt.distill("demo", system_prompt=TEXT, questions=[{"input": "a"}], choice_weight=1.0, **QUICK)
