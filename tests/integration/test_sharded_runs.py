"""Runs over a base that two processes share: methods, sweep, distillation, evaluation."""

from __future__ import annotations

import math

import pytest
from transformers import AutoModelForSequenceClassification

from oracles import families
from oracles.processes import run_together
from oracles.ranks import assert_close
from oracles.tiny_bases import write_base
from oracles.tokenizers import chat_bpe
from softprompt import distill, evaluate, sweep, tune
from softprompt.backbone import load_base
from softprompt.errors import BackboneError
from softprompt.world import joined

WORDS = ("good", "bad", "late", "early", "so bad that all of us left", "fine")
ALL = [{"input": f"It is {word}.", "output": word.split()[-1]} for word in WORDS * 2]
HOW = {"verbalizer": "{{input}} Label: ", "num_epochs": 2, "batch_size": 4, "max_target_length": 12}
HOW |= {"silence_progress_bars": True}
TOKENS = {"tuning_config": {"num_virtual_tokens": 3}}
METHODS = {
    "p_tuning": {"method": "p_tuning", **TOKENS},
    "prefix": {"method": "prefix", **TOKENS},
    "cpt": {"method": "cpt", "context_records": 2},
}
TEXT = "Answer with one word: good or bad. The parcel service is late again, and label every input."
TAUGHT = {
    "num_virtual_tokens": 3,
    "max_source_length": 48,
    "max_target_length": 6,
    "num_epochs": 2,
    "batch_size": 4,
}


def values(tuned):
    return {name: value.detach().clone() for name, value in tuned.module.stored().items()}


def work(folder, chat, head, output, shard):
    """What runs come to, in processes that share a base or in one that has all of it."""
    found = {
        name: values(tune(folder, ALL[:9], ALL[9:], shard=shard, **HOW, **own)) for name, own in METHODS.items()
    }
    tuned = tune(folder, ALL[:9], shard=shard, **HOW, **TOKENS)
    with joined():
        report = evaluate(tuned, ALL, batch_size=4)
    found["evaluate"] = [report.accuracy, math.log(report.perplexity)], [each.answer for each in report.outcomes]
    asked = [{"input": f"is parcel {number} late"} for number in range(9)]
    options = {**TAUGHT, "silence_progress_bars": True, "output": f"{output}/distilled", "shard": shard}
    found["distill"] = values(distill(chat, system_prompt=TEXT, questions=asked, **options))
    space = {"learning_rates": ["x0.3", "x1"], "lengths": ["2", "3"]}
    best = sweep(folder, ALL[:9], ALL[9:], output=f"{output}/swept", space=space, shard=shard, **HOW)
    found["sweep"] = values(best.prompt), [each.name for each in best.candidates]
    found["head"] = refused(head, shard)
    return found


def refused(folder, shard):
    """What a model that is no language model is refused with."""
    with pytest.raises(BackboneError) as caught:
        load_base(AutoModelForSequenceClassification.from_pretrained(folder), tokenizer=chat_bpe(), shard=shard)
    return str(caught.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of the whole base, and of each of the processes that share it."""
    root = tmp_path_factory.mktemp("runs")
    folder = write_base(root / "llama", "llama")
    families.widened(families.causal("llama", vocab_size=330, max_position_embeddings=512)).save_pretrained(
        root / "chat"
    )
    chat_bpe().save_pretrained(root / "chat")
    families.build(AutoModelForSequenceClassification, families.ENCODERS["bert"](), num_labels=3).save_pretrained(
        root / "head"
    )
    given = folder, str(root / "chat"), str(root / "head")
    alone = work(*given, str(root / "alone"), None)
    (root / "group").mkdir()
    return alone, run_together(work, root / "group", *given, str(root / "shared"), "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "evaluate", "distill", "sweep", "head"])
def test_runs_over_a_sharded_base_come_to_what_one_process_does(found, name):
    alone, ranks = found
    assert "is neither a causal nor a seq2seq language model" in alone["head"]
    for each in ranks:
        assert_close(alone[name], each[name], name)
