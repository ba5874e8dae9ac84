"""Prompts of keys and values in every engine, against one row at a time behind a cache filled by hand."""

from __future__ import annotations

import pytest
import torch

from oracles.checkpointing import recompute
from oracles.families import causal, seq2seq
from oracles.prefixed import random_prefix, solo_decoder_logits, solo_logits_behind
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from softprompt.backbone import Base, facts_of
from softprompt.engine import ForestEngine, PlainEngine, build_engine
from softprompt.engine.padded import ExpandEngine
from softprompt.errors import ConfigError, ContextOverflowError, DataError

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
ROWS = [
    RowCase((5, 6, 7, 8, 9, 10, 11, 12, 13), (14, 15), 0),
    RowCase((5, 6, 7), (8,), 0),
    RowCase((5, 6, 7), (9, 10), 0),
    RowCase((20, 21, 22), (23, 24, 25), 1),
    RowCase((30, 31), (32,), -1),
]
FOREST = ["llama", "gpt2", "mistral", "gemma2", "gpt_neox", "opt"]
CACHED = ["bloom", "gpt_neo", "mpt"]


def prompts_for(model, lengths=(5, 3)):
    return [random_prefix(model, n, seed).requires_grad_() for seed, n in enumerate(lengths)]


def solo(model, prompts, row):
    prefix = prompts[row.prompt] if row.prompt >= 0 else None
    logits = solo_logits_behind(model, prefix, [*row.source, *row.target])
    start = len(row.source) - 1
    log_probs = logits[start : start + len(row.target)].log_softmax(-1)
    return log_probs[torch.arange(len(row.target)), torch.tensor(row.target)]


def expected(model, rows):
    prompts = prompts_for(model)
    values = torch.cat([solo(model, prompts, row) for row in rows])
    return values, torch.autograd.grad(values.sum(), prompts)


def check(engine, model, rows=ROWS):
    values, gradients = expected(model, rows)
    prompts = prompts_for(model)
    got = engine.target_log_probs(engine_rows(rows, prompts)).values
    torch.testing.assert_close(got, values, **CLOSE)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), prompts), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", only(["llama", "gemma2"], FOREST))
def test_forest(name, monkeypatch):
    model = causal(name)
    engine = ForestEngine(Base(model))
    assert engine._reads(engine_rows(ROWS, prompts_for(model)))
    monkeypatch.delattr(PlainEngine, "run_alike")
    check(engine, model)


@pytest.mark.parametrize("name", only(["llama", "gemma2", "bloom"], [*FOREST, *CACHED]))
def test_plain(name):
    model = causal(name)
    check(PlainEngine(Base(model)), model)


@pytest.mark.parametrize("name", CACHED)
def test_expand(name, monkeypatch):
    model = causal(name)
    monkeypatch.delattr(PlainEngine, "run_alike")
    check(ExpandEngine(Base(model)), model)


@pytest.mark.parametrize("engine", [ForestEngine, PlainEngine])
@pytest.mark.parametrize("reentrant", only([False], [True, False]))
@pytest.mark.parametrize("projected", only([True], [True, False]))
def test_checkpointing_changes_nothing(engine, reentrant, projected):
    """A prefix that was made from others has a graph that must not be run through twice."""
    model = causal("llama")
    before = torch.nn.Parameter(random_prefix(model, 4))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            recompute(model, {"use_reentrant": reentrant})
        model.train()
        prompts = [before.tanh() * before if projected else before, random_prefix(model, 2, 1)]
        values = engine(Base(model)).target_log_probs(engine_rows(ROWS, prompts)).values
        before.grad = None
        values.sum().backward()
        results.append((values.detach(), before.grad.clone()))
    torch.testing.assert_close(results[0], results[1], **CLOSE)
    assert model.config._attn_implementation == "sdpa"


def test_the_cache_path_refuses_checkpointing():
    model = causal("gpt_neo")
    recompute(model)
    model.train()
    with pytest.raises(ConfigError, match="gradient checkpointing drops the cache"):
        PlainEngine(Base(model)).target_log_probs(engine_rows(ROWS[:1], prompts_for(model)))


@pytest.mark.parametrize("name", only(["llama"], ["llama", "gpt_neo"]))
@pytest.mark.parametrize("engine", ["forest", "plain"])
def test_keys_and_values_and_rows_in_one_batch(name, engine):
    if name == "gpt_neo" and engine == "forest":
        engine = "expand"
    model = causal(name)
    prefix = random_prefix(model, 4).requires_grad_()
    rows = (torch.randn(3, facts_of(model).token_dim) * 0.3).requires_grad_()
    both = build_engine(Base(model), engine).target_log_probs(engine_rows(ROWS, [prefix, rows]))
    alone = [PlainEngine(Base(model)).target_log_probs(engine_rows([row], [prefix, rows])).values for row in ROWS]
    torch.testing.assert_close(both.values, torch.cat(alone), **CLOSE)
    ours = torch.autograd.grad(both.values.sum(), [prefix, rows])
    theirs = torch.autograd.grad(torch.cat(alone).sum(), [prefix, rows])
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", only(["t5"], ["t5", "bart"]))
@pytest.mark.parametrize("field", ["prompt", "decoder"])
def test_seq2seq(name, field):
    model = seq2seq(name)
    plan = [((5, 6, 7, 8), (9, 10), 0), ((11, 12), (13, 14, 15), 1), ((16, 17, 18), (19,), -1)]
    rows = [RowCase(source, target, **({"prompt": -1} | {field: prompt})) for source, target, prompt in plan]
    results = []
    for fast in (True, False):
        prompts = prompts_for(model)
        if fast:
            values = build_engine(Base(model)).target_log_probs(engine_rows(rows, prompts)).values
        else:
            parts = []
            for source, target, prompt in plan:
                start = model.prepare_decoder_input_ids_from_labels(torch.tensor([target]))
                prefix = prompts[prompt] if prompt >= 0 else None
                logits = solo_decoder_logits(model, prefix, list(source), start[0].tolist())
                picked = logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
                parts.append(picked)
            values = torch.cat(parts)
        results.append((values, torch.autograd.grad(values.sum(), prompts)))
    torch.testing.assert_close(results[0], results[1], **CLOSE)


def test_a_forest_that_reads_otherwise_is_not_used(monkeypatch):
    """The probe compares gradients too: a forest that drops values runs plain, silently right."""
    model = causal("qwen2")
    monkeypatch.setattr(
        "softprompt.engine.forest.forest_attention.LayerMask.behind",
        lambda self, stream, module, part: torch.cat(
            [stream, *(p[0, part].transpose(0, 1).flatten(1) for p in self.prefixes)]
        ),
    )
    check(ForestEngine(Base(model)), model)


def test_what_cannot_be_run():
    model = causal("gpt2")
    prompts = prompts_for(model)
    engine = build_engine(Base(model))
    with pytest.raises(ContextOverflowError, match="60 \\+ 5 virtual tokens exceed"):
        engine.target_log_probs(engine_rows([RowCase((5,) * 59, (6,), 0)], prompts))
    with pytest.raises(DataError, match="nothing stands before its answer"):
        engine.target_log_probs(engine_rows([RowCase((), (6,), 0)], prompts))
    with pytest.raises(ConfigError, match="keys and values stand in front"):
        engine.target_log_probs(engine_rows([RowCase((5, 6), (6,), 0, at=1)], prompts))
