"""All sections at once on the bundled model, and what stands in place of those that cannot be had."""

from __future__ import annotations

import json

import pytest

import softprompt
from oracles import tiny_bases
from oracles.stored import drawn
from softprompt import compare, inspect_prompt, load
from softprompt.backbone import load_base
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import Baseline


def test_every_section_of_a_prompt_of_virtual_tokens_is_there(found):
    assert found.missing == {}
    assert found.records == 8
    assert list(found.values) == ["input"]
    assert list(found.attention) == ["self"]
    assert len(found.leave_one_out.change) == 4
    assert [point["epoch"] for point in found.history] == [1, 2]
    (alike,) = found.similarity
    assert (alike.mean, alike.matched) == pytest.approx((1, 1))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["leave_one_out"]["change"] == list(found.leave_one_out.change)
    assert "virtual tokens" in str(found)


def test_the_contest_is_that_of_compare_seen_from_the_prompt(found, learnt, records):
    seen = [records[i] for i in range(0, 16, 2)]  # evenly spaced over all
    expected = compare({"prompt": load(learnt), "zero-shot": Baseline()}, seen, silence_progress_bars=True)
    own, other = found.contest.against["zero-shot"], expected.against["zero-shot"]
    assert (own.won, own.lost, own.difference) == (other.lost, other.won, -other.difference)
    assert own.p_value == other.p_value
    if own.interval is not None:
        assert own.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert found.contest.scores["prompt"]["accuracy"] == expected.reports["prompt"].accuracy
    shown = found.contest.examples["zero-shot"]
    assert sum(each.won for each in shown) == min(3, own.won)
    assert len(shown) == min(3, own.won) + min(3, own.lost)
    assert all(records[each.record - 1]["output"] == each.target for each in shown)
    assert all((each.prompt == each.target) == each.won for each in shown)
    assert all((each.other == each.target) != each.won for each in shown)


def test_the_words_are_the_nearest_tokens_and_are_scored(found, learnt):
    tokenizer = load(learnt).tokenizer
    ids = [row[0].token_id for row in found.values["input"].nearest]
    assert found.words == tokenizer.decode(ids)
    assert set(found.contest.scores) == {"prompt", "zero-shot", "nearest words", str(learnt)}
    itself = found.contest.against[str(learnt)]
    assert (itself.won, itself.lost, itself.p_value) == (0, 0, 1.0)


def test_without_the_base_the_artifact_speaks_for_itself(learnt):
    found = inspect_prompt(learnt, with_base=False)
    assert found.values["input"].geometry.effective_rank > 1
    assert found.drift is not None
    reasons = {name: found.missing[name] for name in ("nearest", "attention", "leave_one_out", "contest", "words")}
    assert all("left out as asked" in reason for reason in reasons.values())
    assert (found.attention, found.leave_one_out, found.contest, found.words) == (None, None, None, None)


def test_without_data_the_values_are_there(learnt):
    found = inspect_prompt(learnt)
    assert found.words
    assert found.values["input"].nearest
    assert set(found.missing) == {"attention", "leave_one_out", "contest"}
    assert all("--data" in reason for reason in found.missing.values())


def test_a_prompt_in_memory(learnt):
    tuned = load(learnt)
    found = inspect_prompt(tuned)
    assert found.words
    assert found.values["input"].tokens == tuned.prompt().tokens


@pytest.fixture(scope="module")
def other_kinds(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.mark.slow
def test_a_seq2seq_prompt(other_kinds, records):
    base = tiny_bases.write_base(other_kinds / "bart", "bart")
    types = {"peft_type": "EXTENDED_PROMPT_TUNING", "output_model_types": ["ENCODER", "DECODER"]}
    prompt = tiny_bases.write_prompt(
        other_kinds / "both", base, num_transformer_submodules=2, inference_mode=True, **types
    )
    found = inspect_prompt(prompt, records, limit=2, silence_progress_bars=True)
    assert list(found.values) == ["input", "decoder"]
    assert set(found.attention) == {"encoder", "cross", "self"}
    assert found.leave_one_out.rows == 2
    assert found.contest.task == "generation"
    assert set(found.missing) <= {"history", "drift", "words"}


def test_keys_and_values(other_kinds, records):
    base = tiny_bases.write_base(other_kinds / "llama", "llama")
    shape = load_base(base).key_value_shape
    values = drawn(3, 3, 2 * shape.layers * shape.heads * shape.width)
    prompt = tiny_bases.write_prompt(
        other_kinds / "prefix",
        base,
        tensors={"prompt_embeddings": values},
        **{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "token_dim": shape.heads * shape.width},
        **{"num_layers": shape.layers, "num_attention_heads": shape.heads, "inference_mode": True},
    )
    found = inspect_prompt(prompt, records, limit=2, silence_progress_bars=True)
    assert list(found.values) == ["keys and values"]
    assert len(found.attention["self"].layers[0].by_token) == 3
    assert len(found.leave_one_out.change) == 3
    assert "no neighbours" in found.missing["nearest"]
    assert "no neighbours" in found.missing["words"]


@pytest.mark.slow
def test_a_multitask_prompt_shows_each_task_and_asks_for_one(other_kinds, records):
    base = tiny_bases.write_base(other_kinds / "several", "llama")
    softprompt.tune(
        base,
        {"one": records, "two": records},
        num_epochs=1,
        batch_size=8,
        max_source_length=48,
        verbalizer="{{input}} :",
        method="multitask",
        output=other_kinds / "multitask",
        tuning_config={"num_virtual_tokens": 3},
        distillation_weight=0,
        silence_progress_bars=True,
    )
    found = inspect_prompt(other_kinds / "multitask", records, limit=2)
    assert list(found.values) == ["one", "two"]
    assert [(each.first, each.second) for each in found.similarity] == [("one", "two")]
    assert "one, two" in found.missing["contest"]
    found = inspect_prompt(other_kinds / "multitask", records, limit=2, task_name="two", silence_progress_bars=True)
    assert found.task_name == "two"
    assert found.contest is not None
    assert found.words is not None


def test_a_prompt_that_writes_no_text(other_kinds, records):
    base = tiny_bases.write_base(other_kinds / "classifier", "llama")
    prompt = tiny_bases.write_prompt(
        other_kinds / "seq_cls", base, manifest=False, task_type="SEQ_CLS", inference_mode=True
    )
    found = inspect_prompt(prompt, records, limit=2)
    assert found.values["input"].nearest
    assert "writes no text" in found.missing["attention"]
    assert "SEQ_CLS" in found.missing["contest"]


def test_other_prompts_that_cannot_be_compared_are_named(other_kinds, learnt, records):
    base = tiny_bases.write_base(other_kinds / "foreign", "llama")
    other = tiny_bases.write_prompt(other_kinds / "foreign_prompt", base)
    found = inspect_prompt(learnt, records, against=[other], limit=1, silence_progress_bars=True)
    assert "wide" in found.missing[f"similarity with {other}"]
    assert "was made for" in found.missing[f"contest with {other}"]
    assert found.contest is not None


def test_what_cannot_be_asked(learnt, records):
    with pytest.raises(ConfigError, match="limit expects at least 1"):
        inspect_prompt(learnt, records, limit=0)
    with pytest.raises(DataError):
        inspect_prompt(learnt, "nowhere.jsonl")
    with pytest.raises(ConfigError, match="no task 'x'"):
        inspect_prompt(learnt, records, task_name="x")
    with pytest.raises(softprompt.SoftPromptError, match="nowhere"):
        inspect_prompt(learnt, records, base_model="/nowhere")
