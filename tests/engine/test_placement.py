"""Prompts anywhere in a row and before the decoder's start, against rows put together by hand."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from oracles.families import SEQ2SEQ, causal, seq2seq
from oracles.naive import row_logits
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from softprompt.backbone import Base, facts_of
from softprompt.engine import build_engine
from softprompt.engine.forest.causal_plan import Forest, Path, causal_forest, decoder_forest
from softprompt.engine.forest.engines import encoder_plan
from softprompt.engine.forest.layers import Packing
from softprompt.engine.rows import PromptTable
from softprompt.errors import ConfigError, ContextOverflowError, DataError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CAUSAL = ["gpt2", "llama", "qwen3", "gemma2", "mistral", "opt"]
V = 64


@functools.cache
def model_of(name):
    return (seq2seq if name in SEQ2SEQ else causal)(name).requires_grad_(False)


@functools.cache
def engine_of(name, kind):
    return build_engine(Base(model_of(name)), kind)


def prompts_for(model, *lengths):
    generator = torch.Generator().manual_seed(4)
    width = facts_of(model).token_dim
    return [torch.randn(n, width, generator=generator).requires_grad_() for n in lengths]


def gradients(values, prompts):
    found = torch.autograd.grad(values.sum(), prompts, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, prompts, strict=True)]


def by_hand(model, rows, prompts):
    logits = torch.cat([row_logits(model, row, prompts) for row in rows]).float()
    labels = torch.tensor([token for row in rows for token in row.target])
    return -F.cross_entropy(logits, labels, reduction="none")


def assert_right(kind, name, rows, *lengths):
    model = model_of(name)
    prompts = prompts_for(model, *lengths)
    got = engine_of(name, kind).target_log_probs(engine_rows(rows, prompts)).values
    expected = by_hand(model, rows, prompts)
    torch.testing.assert_close(got, expected, **CLOSE)
    if got.requires_grad:
        for a, b in zip(gradients(got, prompts), gradients(expected, prompts), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


tokens = st.integers(3, 8)


@st.composite
def batches(draw, decoder):
    """Rows that share inputs, prompts and beginnings of answers."""
    sources = draw(st.lists(st.lists(tokens, min_size=1, max_size=6).map(tuple), min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, 7))):
        source = draw(st.sampled_from(sources))
        at = draw(st.integers(0, len(source)))
        target = tuple(draw(st.lists(tokens, min_size=1, max_size=4)))
        own = draw(st.sampled_from([-1, 0, 1, 2])) if decoder else -1
        rows.append(RowCase(source, target, draw(st.sampled_from([-1, 0, 1])), at, own))
    return rows


@pytest.mark.parametrize("kind", ["plain", "forest"])
@pytest.mark.parametrize("name", only(["llama", "gemma2"], CAUSAL))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batches(decoder=False))
def test_causal_rows(name, kind, rows):
    assert_right(kind, name, rows, 5, 3)


@pytest.mark.parametrize("name", only(["bloom"], ["gptj", "bloom"]))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batches(decoder=False))
def test_models_without_the_forest(name, rows):
    assert_right("expand", name, rows, 5, 3)


@pytest.mark.parametrize("kind", only(["forest"], ["plain", "forest"]))
@pytest.mark.parametrize("name", only(["t5", "bart"], SEQ2SEQ))
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batches(decoder=True))
def test_seq2seq_rows_with_prompts_on_both_sides(name, kind, rows):
    assert_right(kind, name, rows, 5, 3, 4)


@pytest.mark.parametrize("name", only(["llama", "t5"], ["llama", "bart", "t5"]))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batches(decoder=False), data=st.data())
def test_order_and_company_change_nothing(name, rows, data):
    if name in SEQ2SEQ:
        rows = [replace(row, decoder=i % 4 - 1) for i, row in enumerate(rows)]
    prompts = prompts_for(model_of(name), 5, 3, 4)
    engine = engine_of(name, "forest")
    whole = engine.target_log_probs(engine_rows(rows, prompts)).row_sums(len(rows))
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = engine.target_log_probs(engine_rows([rows[i] for i in order], prompts)).row_sums(len(rows))
    torch.testing.assert_close(shuffled, whole[list(order)], **CLOSE)
    cut = data.draw(st.integers(0, len(rows)))
    parts = [p for p in (rows[:cut], rows[cut:]) if p]
    split = [engine.target_log_probs(engine_rows(p, prompts)).row_sums(len(p)) for p in parts]
    torch.testing.assert_close(torch.cat(split), whole, **CLOSE)


@pytest.mark.parametrize("name", only(["t5"], ["t5", "bart"]))
def test_prompts_that_do_not_see_the_input_beside_decoder_prompts(name):
    model = model_of(name)
    rows = [
        RowCase((5, 6, 7), (8, 4, 2), 0, 0, 1),
        RowCase((5, 6, 7), (8, 5, 2), 0, 0, 1),
        RowCase((5, 9), (8, 2), 0, 0, -1),
        RowCase((5, 9), (8, 2), -1, 0, 0),
    ]
    prompts = prompts_for(model, 5, 3)
    found = [
        build_engine(Base(model), kind).target_log_probs(engine_rows(rows, prompts, sees_input=False)).values
        for kind in ("plain", "forest")
    ]
    torch.testing.assert_close(*found, **CLOSE)
    pairs = zip(*(gradients(values, prompts) for values in found), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, **CLOSE)


def planned(cases, *lengths, part="input"):
    """Return engine rows and the virtual ids of one part of their prompts."""
    rows = engine_rows(cases, [torch.zeros(length, 4) for length in lengths])
    return rows, PromptTable.of([row.prompt for row in rows], part).ids(V)


def test_how_far_a_prompt_is_shared():
    sources = [(1, 40, 41), (1, 40, 42, 43), (1, 44)]
    lengths = {}
    for name, at in {"prefix": 0, "after BOS": 1, "suffix": None}.items():
        rows = [RowCase(s, (7, 2), 0, len(s) if at is None else at) for s in sources]
        lengths[name] = len(causal_forest(*planned(rows, 20)))
    inputs, answers = sum(map(len, sources)), 3
    assert lengths["prefix"] == 20 + inputs + answers - 2  # the first token is shared as well
    assert lengths["after BOS"] == 20 + inputs + answers - 2
    assert lengths["suffix"] == 3 * 20 + inputs + answers - 2
    labels = [RowCase(sources[0], (7, i), 0, 3) for i in range(50)]
    assert len(causal_forest(*planned(labels, 20))) == 20 + 3 + 1


def test_decoder_rows_of_one_input_are_a_trie():
    labels = [(50, 51, 2), (50, 52, 2), (53, 2)]
    rows = [RowCase((5, 6), label, -1, 0, 0) for label in labels]
    rows += [RowCase((5, 7), label, -1, 0, -1) for label in labels]
    own, virtual = planned(rows, 20, part="decoder")
    encoder = encoder_plan(own, [()] * len(rows), sees_input=True)
    assert len(encoder.plan) == 4 and encoder.owners == (0, 0, 0, 1, 1, 1)
    plan = decoder_forest(own, virtual, encoder.owners, [0] * len(rows)).plan()
    assert len(plan) == 20 + 1 + 4 + 1 + 4
    wanted, predictor = plan.targets.distinct()
    assert len(wanted) == 2 * 5 and len(predictor) == 2 * 8
    packing = Packing.by_column(plan.positions)
    grid = packing.grid(plan.positions, -1)
    columns = torch.arange(grid.shape[1]).expand_as(grid)
    assert torch.equal(grid[grid >= 0], columns[grid >= 0])
    assert packing.shape == (3, 20 + 1 + 2)


def test_keys_and_values_take_positions_but_no_tokens():
    rows = [RowCase((5, 6, 7), (8, 2)), RowCase((5, 9), (8, 4, 2)), RowCase((5,), (3,), 1)]
    prompts = [torch.zeros(2, 2, 1, 6, 4), torch.zeros(3, 4)]
    rows = engine_rows(rows, prompts)
    table = PromptTable.of([row.prompt for row in rows])
    assert table.table.shape == (3, 4)
    forest = causal_forest(rows, table.ids(V))
    plan = forest.plan()
    assert [root.offset for root in forest.roots] == [6, 0]
    assert len(plan) == 1 + 2 + 1 + 1 + 2 + 3 + 1
    by_owner = {}
    for span in (span for kind in plan.kinds for span in kind):
        by_owner.setdefault(span.owner, []).extend(plan.positions[span.queries].tolist())
    assert sorted(by_owner[rows[0].prompt]) == [6, 7, 7, 8, 8, 9, 9]
    assert sorted(by_owner[rows[2].prompt]) == [0, 1, 2, 3]


def test_paths_of_one_owner_only_meet_each_other():
    forest = Forest.of([Path(0, (5, 6), (7,)), Path(1, (5, 6), (7,)), Path(0, (5, 8), (7,))])
    assert [root.tokens for root in forest.roots] == [(5,), ()]
    assert len(forest) == 1 + 1 + 1 + 2


@pytest.mark.parametrize("kind", ["plain", "expand", "forest"])
def test_a_place_that_is_not_there(kind):
    model = causal("llama").requires_grad_(False)
    engine = build_engine(Base(model), kind)
    for at in (3, -1):
        with pytest.raises(DataError, match=f"behind {at} tokens, but its input has 2"):
            engine.target_log_probs(engine_rows([RowCase((5, 6), (7, 2), 0, at)], prompts_for(model, 3)))


@pytest.mark.parametrize("kind", ["plain", "forest"])
def test_what_cannot_be_is_refused(kind):
    t5, llama = model_of("t5"), model_of("llama")
    prompts = prompts_for(t5, 3)
    isolated = build_engine(Base(t5), kind)
    with pytest.raises(ConfigError, match="a prompt that does not see the input stands in front"):
        isolated.target_log_probs(engine_rows([RowCase((5, 6), (7, 2), 0, 1)], prompts, sees_input=False))
    with pytest.raises(ConfigError, match="has no encoder and decoder"):
        engine_of("llama", kind).target_log_probs(
            engine_rows([RowCase((5, 6), (7, 2), decoder=0)], prompts_for(llama, 3))
        )
    with pytest.raises(ConfigError, match="keys and values stand in front"):
        engine_of("llama", kind).target_log_probs(
            engine_rows([RowCase((5, 6), (7, 2), 0, 1)], [torch.zeros(2, 2, 1, 6, 4)])
        )
    with pytest.raises(DataError, match="row 0 holds the id 65"):
        engine_of("t5", kind).target_log_probs(engine_rows([RowCase((5, 6), (65, 2), 0)], prompts))


@pytest.mark.parametrize("kind", ["plain", "forest"])
def test_the_decoders_context_counts_its_prompt(kind):
    engine, prompts = engine_of("bart", kind), prompts_for(model_of("bart"), 10)
    engine.target_log_probs(engine_rows([RowCase((5,), tuple([6] * 54), -1, 0, 0)], prompts))
    with pytest.raises(ContextOverflowError, match=r"55 \+ 10 virtual tokens exceed the decoder's 64"):
        engine.target_log_probs(engine_rows([RowCase((5,), tuple([6] * 55), -1, 0, 0)], prompts))


def test_keys_and_values_alone_predict_nothing():
    with pytest.raises(DataError, match="nothing stands before its answer"):
        engine_of("llama", "forest").target_log_probs(
            engine_rows([RowCase((), (7, 2), 0)], [torch.zeros(2, 2, 1, 6, 4)])
        )
