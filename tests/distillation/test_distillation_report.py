"""The report of a distillation: against passes by hand, and against prompts whose numbers are known."""

from __future__ import annotations

import json

import pytest
import torch

from softprompt.backbone import freeze, load_base
from softprompt.cli.main import run
from softprompt.distillation import DistillSettings, Question, Teacher, measured_on, report_of
from softprompt.distillation.texts import SourceText
from softprompt.errors import DataError

TEXT = "Text: It broke.\nLabel: complaint\n\nText: When do you open?\nLabel: no complaint"
TEMPLATE = "Text: {{input}}\nLabel:"
ASKED = ["The kettle leaks.", "Thank you all.", "Nobody answers my mails!"]
LENGTH = 5


def teacher_of(reading, **settings):
    base = load_base("demo")
    freeze(base.model)
    chosen = {
        "verbalizer": TEMPLATE,
        "chat": False,
        "max_source_length": 64,
        "max_target_length": 6,
        "batch_size": 2,
    }
    return Teacher.of(base, reading, DistillSettings.from_dict({**chosen, **settings}))


@pytest.fixture(scope="module")
def teacher():
    return teacher_of(SourceText("system prompt", (("text", TEXT),)))


@pytest.fixture(scope="module")
def beginning(teacher):
    """The first tokens of the text as the prompt, asked three questions."""
    tuned = teacher.with_ids(teacher.passages[0].ids[:LENGTH])
    return measured_on(tuned, teacher, [Question({"input": text}, None) for text in ASKED], top_k=10**6)


@pytest.fixture(scope="module")
def report(beginning):
    return report_of(beginning, beginning.held_out.questions)


def log_probs(model, ids, behind):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -behind - 1 : -1]
    return logits.double().log_softmax(dim=-1)


def test_the_divergence_is_that_of_two_passes_by_hand(teacher, beginning, report):
    model, held_out = teacher.base.model, beginning.held_out
    between = teacher.with_ids(()).rows.text("\n\n")
    sums, same, tokens = 0.0, 0, 0
    for row in held_out.rows:
        wanted, bare = (
            log_probs(model, [*front, *row.source, *row.target], len(row.target))
            for front in ((*teacher.passages[0].ids, *between), ())
        )
        sums += float((wanted.exp() * (wanted - bare)).sum())
        same += int((wanted.argmax(dim=1) == bare.argmax(dim=1)).sum())
        tokens += len(row.target)
    bare = report.readers[0]
    assert report.answer_tokens == tokens
    assert bare.nats == pytest.approx(sums / tokens, rel=1e-3)
    assert bare.agreement == pytest.approx(same / tokens)


def test_the_readers_and_what_they_share(teacher, report):
    names = [each.name for each in report.readers]
    length = report.prompt.tokens
    assert names[0] == "no text"
    assert names[1:] == [
        f"its first {length} tokens",
        f"a summary, {length} tokens",
        "the prompt",
        "the whole text",
    ]
    nothing, _, summary, prompt, whole = report.readers
    assert (nothing.share, whole.nats, whole.agreement, whole.share) == (0.0, 0.0, 1.0, 1.0)
    assert prompt.share == pytest.approx(1 - prompt.nats / nothing.nats)
    assert whole.tokens == len(teacher.passages[0].ids)
    assert 0 < summary.tokens <= length


def test_the_whole_text_as_the_prompt_is_no_loss_and_saves_nothing(teacher):
    whole = teacher.tuned[0]
    report = report_of(measured_on(whole, teacher, [Question({"input": text}, None) for text in ASKED]), ())
    assert report.prompt.nats == pytest.approx(0, abs=1e-5)
    assert report.prompt.agreement == 1
    assert report.prompt.share == pytest.approx(1, abs=1e-5)
    assert report.damage["the prompt"] == pytest.approx(report.damage["the whole text"])
    assert report.requests_to_pay is None
    assert "never" in str(report)


def test_savings_in_tokens_bytes_and_requests(teacher, report):
    saved = report.readers[-1].tokens - report.prompt.tokens
    shape = teacher.base.key_value_shape
    assert report.tokens_saved == saved > 0
    assert report.bytes_saved == saved * shape.layers * 2 * shape.heads * shape.width * 4
    assert report.requests_to_pay == report.tokens_read / saved > 0
    assert f"saves {saved:,.0f} tokens a request" in str(report)


def test_damage_on_questions_of_ones_own(teacher, beginning, tmp_path):
    file = tmp_path / "unrelated.jsonl"
    file.write_text(json.dumps({"input": "What is 2 and 2?", "output": "2 and 2 is 4."}) + "\n")
    report = report_of(beginning, (), unrelated=file)
    assert report.unrelated == 1
    assert min(report.damage.values()) > 0


def test_labels_are_scored_as_the_prompt_classifies():
    examples = tuple(
        ({"input": text}, label)
        for text, label in [
            ("It broke.", "complaint"),
            ("Thanks!", "no complaint"),
            ("Open today?", "no complaint"),
        ]
    )
    teacher = teacher_of(SourceText("examples", examples=examples), task="classification")
    gold = ["complaint", "no complaint", "complaint"]
    questions = [Question({"input": t}, g, labelled=True) for t, g in zip(ASKED, gold, strict=True)]
    tuned = teacher.with_ids(teacher.passages[0].ids[:LENGTH])
    report = report_of(measured_on(tuned, teacher, questions), ())
    for reader, side in ((report.prompt, tuned), (report.readers[-1], teacher.tuned[0])):
        found = [each.label for each in side.classify([each.request for each in questions])]
        assert reader.accuracy == sum(map(str.__eq__, found, gold)) / len(gold)
    assert "accuracy" in str(report)
    assert not any("summary" in each.name for each in report.readers)


@pytest.mark.slow
def test_given_answers_are_compared_with_what_each_reader_writes(teacher):
    asked = [{"input": text} for text in ASKED]
    written = [each.text for each in teacher.tuned[0].generate(asked, max_new_tokens=5)]
    gold = [f" {written[0]}\n", written[1], "something else"]
    questions = [Question(one, text, labelled=True) for one, text in zip(asked, gold, strict=True)]
    questions.append(Question({"input": "Not given."}, None))
    tuned = teacher.with_ids(teacher.passages[0].ids[:LENGTH])
    report = report_of(measured_on(tuned, teacher, questions), ())
    ours = [each.text.strip() for each in tuned.generate(asked, max_new_tokens=5)]
    assert report.prompt.exact_match == sum(map(str.__eq__, ours, map(str.strip, gold))) / 3
    assert report.readers[-1].exact_match == 2 / 3
    assert [each.accuracy for each in report.readers] == [None] * 5
    head, *lines = str(report).splitlines()
    assert head.endswith(" exact match")
    assert lines[4].endswith(" 0.667")


def test_without_given_answers_there_is_nothing_to_be_right_about(report):
    assert [each.exact_match for each in report.readers] == [None] * 5
    assert "exact match" not in str(report)


def test_nothing_was_kept_apart(teacher):
    with pytest.raises(DataError, match="nothing to measure on; give questions"):
        report_of(measured_on(teacher.tuned[0], teacher, []), ())


@pytest.mark.slow
def test_a_run_ends_with_its_report_and_can_be_measured_again(tmp_path, capsys):
    text, questions, other = (tmp_path / name for name in ("text.txt", "questions.jsonl", "other.jsonl"))
    text.write_text(TEXT)
    questions.write_text("".join(json.dumps({"input": f"Parcel {n} is late."}) + "\n" for n in range(6)))
    other.write_text(json.dumps({"input": "It is broken!"}) + "\n")
    prompt = tmp_path / "prompt"
    common = ["distill", "--system-prompt", str(text), "--json", "--quiet"]
    options = ["--verbalizer", TEMPLATE, "--no-chat", "--num-virtual-tokens", "4", "--num-epochs", "1"]
    options += [
        "--max-source-length",
        "48",
        "--max-target-length",
        "4",
        "--held-out",
        "0.3",
        "--output",
        str(prompt),
    ]
    assert run([*common, *options, "--questions", str(questions)]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((prompt / "distillation.json").read_text())
    assert found["report"] == kept
    assert kept["questions"] == 2
    card = (prompt / "README.md").read_text()
    assert f"| distilled.nats_per_token | {kept['readers'][3]['nats']:.4g} |" in card
    assert run([*common, "--measure", str(prompt)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["readers"][3]["nats"] == pytest.approx(kept["readers"][3]["nats"], rel=1e-3)
    assert run([*common, "--measure", str(prompt), "--questions", str(other)]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 1
    assert run([*common, "--measure", str(prompt), "--num-epochs", "3"]) == 2
    assert "would be ignored" in capsys.readouterr().err
    assert run(["distill", "--system-prompt", str(questions), "--measure", str(prompt), "--quiet"]) == 2
    assert "was made of a text of" in capsys.readouterr().err
    alike = tmp_path / "alike.txt"
    alike.write_text(TEXT[:-1] + ("!" if TEXT[-1] != "!" else "?"))
    assert run(["distill", "--system-prompt", str(alike), "--measure", str(prompt), "--quiet"]) == 2
    assert "this is another of" in capsys.readouterr().err
    for line in (
        "[1",
        "[" * 100_000,
        '{"request": 1, "answer": "x"}',
        '{"request": {}, "answer": null, "passage": "x"}',
    ):
        (prompt / "questions.jsonl").write_text(line)
        (prompt / "held_out.jsonl").unlink(missing_ok=True)
        assert run([*common, "--measure", str(prompt)]) == 2
        assert "questions.jsonl is damaged" in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert run([*common, *options[:-1], str(plain), "--questions", str(questions), "--no-report"]) == 0
    assert not (plain / "distillation.json").exists()
