"""Baselines: a base with a text before the input, exactly as if the text's tokens stood there."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

import pytest
import torch

from oracles.families import tiny
from oracles.probed import sharing
from oracles.slow import only
from oracles.tokenizers import byte_bpe
from softprompt.backbone import Base
from softprompt.data import encode
from softprompt.engine import EngineRow, PlainEngine
from softprompt.errors import ConfigError, ContextOverflowError, DataError
from softprompt.evaluation import Baseline, evaluate

RECORDS = [
    {"input": text, "output": label}
    for text, label in [("fine work", "good"), ("it broke", "poor"), ("ok", "so so"), ("never", "poor")]
]
LABELS = ["good", "poor", "so so"]
EXAMPLES = [{"input": f"{label} {i}", "output": label} for label in LABELS for i in range(5)]
TEMPLATE = "Q: {{input}}\nA:"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(params=only(["with BOS"], ["without BOS", "with BOS"]))
def base(request):
    tokenizer = byte_bpe(bos=request.param == "with BOS")
    model = sharing(tiny("llama", seed=3, vocab_size=len(tokenizer), max_position_embeddings=256))
    return Base(model, tokenizer)


def alone(base, **options):
    """Return a baseline on the base itself, whose tokenizer is not beside it."""
    base.model.name_or_path = base.model.config._name_or_path = ""
    options = {"template": TEMPLATE, "labels": LABELS, **options}
    return Baseline(base_model=base.model, tokenizer=base.tokenizer, **options)


def scores_of_ids(base, before, record):
    """Score labels behind plain token ids, on the padded path, with no prompt at all."""
    tokenizer = base.tokenizer
    source = encode(tokenizer, [TEMPLATE.replace("{{input}}", record["input"])], special=False)[0]
    start = (tokenizer.bos_token_id,) if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ()
    targets = [encode(tokenizer, [f" {label}"], special=False)[0] + (tokenizer.eos_token_id,) for label in LABELS]
    rows = [EngineRow((*start, *before, *source), target) for target in targets]
    with torch.no_grad():
        return PlainEngine(base).target_log_probs(rows).row_sums(len(rows))


def text_ids(base, *texts):
    return [token for text in texts for token in encode(base.tokenizer, [text], special=False)[0]]


def test_an_instruction_is_its_tokens_before_the_input(base):
    report = evaluate(alone(base, instruction="Rate the text.\n"), RECORDS)
    before = text_ids(base, "Rate the text.", "\n\n")
    assert (report.baseline, report.prompt_tokens) == ("instruction", len(before))
    for outcome, record in zip(report.outcomes, RECORDS, strict=True):
        expected = torch.softmax(scores_of_ids(base, before, record), dim=0)
        assert list(outcome.probabilities) == LABELS
        assert list(outcome.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_demonstrations_are_the_template_with_their_answers(base):
    shown = [{"input": "so good", "output": "good"}, {"input": "so bad", "output": "poor"}]
    report = evaluate(alone(base, few_shot=2, examples=shown, instruction="Rate."), RECORDS[:3])
    texts = [(f"Q: {each['input']}\nA:", f" {each['output']}", "\n\n") for each in shown]
    probabilities = []
    for order in (texts, texts[::-1]):
        before = text_ids(base, "Rate.", "\n\n", *order[0], *order[1])
        found = [scores_of_ids(base, before, record) for record in RECORDS[:3]]
        probabilities.append(torch.softmax(torch.stack(found), dim=1))
    assert report.prompt_tokens == len(before)
    got = torch.tensor([list(each.probabilities.values()) for each in report.outcomes])
    assert min((got - each).abs().max() for each in probabilities) < 1e-5


def test_zero_shot_is_the_base_without_prompt(make_tuned):
    tuned = make_tuned()
    (found,) = evaluate(tuned, RECORDS, baselines=[Baseline()]).baselines.values()
    expected = evaluate(tuned, RECORDS, without_prompt=True)
    assert found == dataclasses.replace(expected, baseline="zero-shot")
    assert found.prompt_tokens == 0


def test_generation_behind_demonstrations_is_that_behind_their_tokens(make_tuned):
    tuned = make_tuned(task="generation", labels=None)
    baseline = Baseline(instruction="Say it again.", few_shot=2, examples=EXAMPLES)
    (report,) = evaluate(tuned, RECORDS, baselines=[baseline]).baselines.values()
    assert report.task == "generation"
    assert report.prompt_tokens > 20
    forest, plain = (
        evaluate(tuned, RECORDS, baselines=[baseline], engine=engine).baselines[report.baseline]
        for engine in ("forest", "plain")
    )
    assert forest.perplexity == pytest.approx(plain.perplexity, rel=1e-4)


def test_demonstrations_are_balanced_seeded_and_not_those_evaluated(make_tuned, caplog):
    from softprompt.evaluation import baselines

    drawn = baselines._drawn
    seen = []
    pool = [*EXAMPLES, *RECORDS]

    def watched(records, baseline):
        seen.append(drawn(records, baseline))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "softprompt"):
        patch.setattr(baselines, "_drawn", watched)
        for seed in (0, 0, 1):
            evaluate(make_tuned(), RECORDS, baselines=[Baseline(few_shot=6, examples=pool, seed=seed)])
    assert Counter(record.target for record in seen[0]) == {"good": 2, "poor": 2, "so so": 2}
    assert seen[0] == seen[1] != seen[2]
    assert not {record.fields["input"] for part in seen for record in part} & {each["input"] for each in RECORDS}
    assert "4 of 19 examples are among the records that are evaluated" in caplog.text


def test_a_chat_has_the_text_in_its_system_turn(base):
    base.tokenizer.chat_template = CHAT
    report = evaluate(alone(base, instruction="Be brief.", chat=True), RECORDS[:2])
    plain = f"<system>Be brief.</system><user>{TEMPLATE}</user><assistant>"
    for outcome, record in zip(report.outcomes, RECORDS, strict=False):
        head, rest = plain.replace("{{input}}", record["input"]).split("Be brief.")
        ids = text_ids(base, head, "Be brief.", *rest.partition(f"Q: {record['input']}\nA:"))
        answers = encode(base.tokenizer, [f" {label}" for label in LABELS], special=False)
        targets = [(*answer, base.tokenizer.eos_token_id) for answer in answers]
        with torch.no_grad():
            rows = [EngineRow(tuple(ids), target) for target in targets]
            expected = torch.softmax(PlainEngine(base).target_log_probs(rows).row_sums(len(rows)), dim=0)
        assert list(outcome.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    zero = evaluate(alone(base, chat=True), RECORDS[:2])
    assert (zero.baseline, zero.prompt_tokens) == ("zero-shot", 0)


def test_chats_are_evaluated_as_they_are_behind_an_instruction(base, caplog):
    base.tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "good"}]
    chats = [{"messages": turns}] * 2
    found = evaluate(alone(base, template=None, chat=True, instruction="Be brief."), chats)
    ids = text_ids(base, "<system>", "Be brief.", "</system><user>So?</user><assistant>")
    zero = evaluate(alone(base, template=None, chat=True), chats)
    assert evaluate(alone(base, template=None), chats) == zero  # as tune renders what no template can show
    assert found.prompt_tokens == len(text_ids(base, "Be brief."))
    assert found.input_tokens + found.prompt_tokens == len(ids) + zero.prompt_tokens
    with caplog.at_level(logging.INFO, "softprompt"):
        both = [{"instruction": "So?", "input": "late", "output": "good"}] * 2
        evaluate(alone(base, template=None), both)
        assert "with chat (--chat) the base's own renders them, as in tune" in caplog.text
        caplog.clear()
        evaluate(alone(base, template=None, chat=True), both)
        assert "--chat" not in caplog.text
    with pytest.raises(ConfigError, match="few_shot fills in a template"):
        evaluate(alone(base, template=None, chat=True, few_shot=1, examples=chats), chats)


def test_a_text_beyond_the_context_is_refused_with_what_to_do(make_tuned):
    baseline = Baseline(few_shot=12, examples=EXAMPLES)
    with pytest.raises(ContextOverflowError, match=r"12-shot does not fit: .* model's 128.*lower few_shot"):
        evaluate(make_tuned(), RECORDS, baselines=[baseline])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"few_shot": 2}, ConfigError, "without examples"),
        ({"examples": EXAMPLES}, ConfigError, "with examples"),
        ({"instruction": " \n"}, ConfigError, "the instruction is empty"),
        ({"few_shot": 99, "examples": EXAMPLES}, DataError, "there are 15 that are not evaluated"),
        ({"chat": True}, ConfigError, "chat template"),
    ],
)
def test_what_a_baseline_cannot_be(make_tuned, options, error, words):
    with pytest.raises(error, match=words):
        evaluate(make_tuned(), RECORDS, baselines=[Baseline(**options)])


def test_a_baseline_without_a_base_or_with_settings_of_prompts_is_refused(make_tuned, base):
    with pytest.raises(ConfigError, match=r"needs a base.*--base-model"):
        evaluate(Baseline(template=TEMPLATE), RECORDS)
    with pytest.raises(ConfigError, match="without_prompt are for tuned prompts"):
        evaluate(alone(base), RECORDS, without_prompt=True)
    with pytest.raises(ConfigError, match="task_name and without"):
        evaluate(alone(base), RECORDS, task_name="a")
    for subject, beside in ((alone(base), ()), (make_tuned(), [Baseline()])):
        with pytest.raises(ConfigError, match="a baseline answers for one task; give the records of one"):
            evaluate(subject, RECORDS, task_field="task", baselines=beside)
    with pytest.raises(ConfigError, match="zero-shot, zero-shot: two baselines are alike"):
        evaluate(make_tuned(), RECORDS, baselines=[Baseline(), Baseline()])


def test_the_labels_of_a_base_alone_are_those_of_the_data_where_they_look_like_labels(base, caplog):
    with caplog.at_level(logging.INFO, "softprompt"):
        assert evaluate(alone(base, labels=None), RECORDS * 2).predictions.keys() == set(LABELS)
        assert evaluate(alone(base, labels=None, max_target_length=2), RECORDS).task == "generation"
    assert "labels: good, poor, so so" in caplog.text
    assert "labels: none, texts are generated" in caplog.text
    found = evaluate(alone(base, labels=None), RECORDS, task="classification")
    assert found == dataclasses.replace(evaluate(alone(base), RECORDS))


def test_the_report_shows_all_in_one_table(make_tuned):
    report = evaluate(make_tuned(), RECORDS, baselines=[Baseline(), Baseline(few_shot=3, examples=EXAMPLES)])
    lines = str(report).splitlines()
    start = next(number for number, line in enumerate(lines) if "prompt tokens" in line)
    rows = [line.split() for line in lines[start + 1 : start + 4]]
    assert [row[0] for row in rows] == ["tuned", "zero-shot", "3-shot"]
    assert rows[1][1] == f"{report.baselines['zero-shot'].accuracy:.4f}"
    assert rows[2][-1] == str(report.baselines["3-shot"].prompt_tokens)
    assert set(report.to_dict()["baselines"]) == {"zero-shot", "3-shot"}
