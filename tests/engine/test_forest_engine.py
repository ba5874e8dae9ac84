"""The forest equals the one-row-at-a-time oracle, on random forests and many architectures."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracles.families import FOREST, OUTSIDE, SEQ2SEQ, causal, seq2seq
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from softprompt.backbone import Base, facts_of
from softprompt.engine import ForestEngine, PlainEngine, build_engine
from softprompt.engine.forest.causal_plan import causal_forest
from softprompt.engine.forest.engines import PackedSeq2SeqEngine
from softprompt.engine.rows import PromptTable

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@functools.cache
def model_of(name):
    build = seq2seq if name in SEQ2SEQ else causal
    return build(name).requires_grad_(False)


def prompts_for(model, *lengths):
    generator = torch.Generator().manual_seed(4)
    width = facts_of(model).token_dim
    return [torch.randn(n, width, generator=generator).requires_grad_() for n in lengths]


def forest_of(rows, *lengths):
    """Plan rows of a model of 64 tokens under prompts of these lengths."""
    rows = engine_rows(rows, [torch.zeros(length, 4) for length in lengths])
    return causal_forest(rows, PromptTable.of([row.prompt for row in rows]).ids(64))


def solo(model, rows):
    """Score every row by itself on the plain path."""
    engine = PlainEngine(Base(model))
    return torch.cat([engine.target_log_probs([row]).values for row in rows])


def gradients(values, prompts):
    found = torch.autograd.grad(values.sum(), prompts, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, prompts, strict=True)]


def assert_equals_solo(engine, model, rows, prompts, **options):
    own = engine_rows(rows, prompts, **options)
    got, expected = engine.target_log_probs(own), solo(model, own)
    torch.testing.assert_close(got.values, expected, **CLOSE)
    index = [i for i, row in enumerate(rows) for _ in row.target]
    assert got.row_index.tolist() == index
    if any(row.prompt >= 0 for row in rows):
        ours, theirs = gradients(got.values, prompts), gradients(expected, prompts)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


tokens = st.integers(3, 12)  # a small alphabet, so that beginnings and answers are shared


@st.composite
def row(draw):
    """A row with its prompt somewhere; many in front, where it is shared."""
    source = tuple(draw(st.lists(tokens, min_size=1, max_size=9)))
    at = draw(st.sampled_from([0, 0, 1, len(source)]))
    target = tuple(draw(st.lists(tokens, min_size=1, max_size=4)))
    return RowCase(source, target, draw(st.sampled_from([0, 1, -1])), at)


batch = st.lists(row(), min_size=1, max_size=8)


@pytest.mark.parametrize("name", only(["gpt2", "llama", "gemma3", "t5", "bart"], [*FOREST, *SEQ2SEQ]))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batch)
def test_random_forests(name, rows):
    model = model_of(name)
    engine = PackedSeq2SeqEngine(Base(model)) if name in SEQ2SEQ else ForestEngine(Base(model))
    assert_equals_solo(engine, model, rows, prompts_for(model, 5, 3))


@pytest.mark.parametrize("name", only(["bloom"], OUTSIDE))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batch)
def test_random_batches_behind_expanded_prompts(name, rows):
    model = model_of(name)
    assert_equals_solo(build_engine(Base(model), "expand"), model, rows, prompts_for(model, 5, 3))


@pytest.mark.parametrize("name", only(["t5"], SEQ2SEQ))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batch)
def test_prompts_that_do_not_see_the_input(name, rows):
    model = model_of(name)
    rows = [replace(row, at=0) for row in rows]
    engine = build_engine(Base(model), "forest")
    prompts = prompts_for(model, 5, 3)
    assert_equals_solo(engine, model, rows, prompts, sees_input=False)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batch, data=st.data())
def test_permuting_and_splitting_change_nothing(rows, data):
    model = model_of("llama")
    engine, prompts = ForestEngine(Base(model)), prompts_for(model, 5, 3)
    whole = engine.target_log_probs(engine_rows(rows, prompts)).row_sums(len(rows))
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = engine.target_log_probs(engine_rows([rows[i] for i in order], prompts)).row_sums(len(rows))
    torch.testing.assert_close(shuffled, whole[list(order)], **CLOSE)
    cut = data.draw(st.integers(0, len(rows)))
    parts = [engine.target_log_probs(engine_rows(p, prompts)).values for p in (rows[:cut], rows[cut:]) if p]
    torch.testing.assert_close(
        torch.cat(parts), engine.target_log_probs(engine_rows(rows, prompts)).values, **CLOSE
    )


def test_a_prompt_without_any_input():
    model = model_of("llama")
    rows = [RowCase((), (5, 6), 0), RowCase((), (5, 7, 2), 0), RowCase((9,), (4,), -1)]
    assert_equals_solo(ForestEngine(Base(model)), model, rows, prompts_for(model, 4))


def test_each_token_is_planned_once():
    shared = (1, 40, 41)
    labels = [(50, 51, 2), (50, 52, 2), (53, 2)]
    rows = [RowCase((*shared, 7, 8), label) for label in labels]
    rows += [RowCase((*shared, 9), label) for label in labels]
    forest = forest_of(rows, 20)
    # 20 virtual + 3 shared + (2 + 1) own + per source the trie 50, 51, 52, 53; endings are never fed.
    assert len(forest) == 20 + 3 + 3 + 2 * 4
    assert len(forest.roots) == 1 and len(forest.groups) == 2
    assert forest.plan().positions.max() == 20 + 3 + 2 + 2 - 1


def test_blocks_stay_linear_in_rows():
    rows = [RowCase(tuple(range(3 + i, 33 + i)), (2,)) for i in range(64)]
    seen = sum(block.sees.numel() for block in forest_of(rows, 10).plan().visibility().blocks)
    assert seen <= 64 * 30 * 40 + 10 * 10


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", only([False], [True, False]))
@pytest.mark.parametrize("name", only(["llama", "t5"], ["llama", "gpt2", "t5"]))
def test_gradient_checkpointing(name, reentrant):
    model = (seq2seq if name in SEQ2SEQ else causal)(name).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for attribute in (
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "dropout_rate",
        "attention_dropout",
    ):
        if hasattr(model.config, attribute):
            setattr(model.config, attribute, 0.0)
    rows = [RowCase((5, 6, 7), (8, 2)), RowCase((5, 9), (8, 4, 2))]
    prompts = prompts_for(model, 4)
    engine = build_engine(Base(model), "forest")
    before = model.config._attn_implementation
    expected = gradients(engine.target_log_probs(engine_rows(rows, prompts)).values, prompts)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    values = engine.target_log_probs(engine_rows(rows, prompts)).values
    values.sum().backward()
    torch.testing.assert_close(prompts[0].grad, expected[0], **CLOSE)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", only(["llama"], ["llama", "t5"]))
def test_half_precision(name):
    model = (seq2seq if name in SEQ2SEQ else causal)(name).requires_grad_(False)
    rows = [RowCase((5, 6, 7), (8, 2)), RowCase((5, 9), (8, 4, 2))]
    prompts = prompts_for(model, 4)
    exact = PlainEngine(Base(model)).target_log_probs(engine_rows(rows, prompts)).values
    model.to(torch.bfloat16)
    engine = build_engine(Base(model), "forest")
    values = engine.target_log_probs(engine_rows(rows, prompts)).values
    assert values.dtype is torch.float32
    torch.testing.assert_close(values, exact, atol=0.1, rtol=0.05)
    values.sum().backward()
    assert prompts[0].grad.dtype is torch.float32 and prompts[0].grad.abs().sum() > 0


def test_autocast():
    model = model_of("llama")
    rows = [RowCase((5, 6, 7), (8, 2)), RowCase((5, 9), (8, 4, 2))]
    prompts = prompts_for(model, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = ForestEngine(Base(model)).target_log_probs(engine_rows(rows, prompts)).values
    exact = PlainEngine(Base(model)).target_log_probs(engine_rows(rows, prompts)).values
    torch.testing.assert_close(values.float(), exact, atol=0.1, rtol=0.05)


def test_the_base_is_left_as_it_was():
    model = causal("llama")
    ids = torch.tensor([[5, 6, 7]])
    before, implementation = model(ids).logits, model.config._attn_implementation
    ForestEngine(Base(model)).target_log_probs(engine_rows([RowCase((5,), (6,))], prompts_for(model, 3)))
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, before)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batch)
def test_the_tree_says_what_the_blocks_say(rows):
    forest = forest_of(rows, 5, 3)
    plan = forest.plan().visibility()
    enter, leave = plan.tree
    tree = (enter[None] <= enter[:, None]) & (enter[:, None] < leave[None])  # [query, key]
    slots = [
        keys[seen]
        for block in plan.blocks
        for keys, sees in zip(block.keys, block.sees, strict=True)
        for seen in sees
    ]
    for token in range(len(forest)):
        seen = slots[int(plan.where[token])]
        assert set(seen.tolist()) == set(tree[token].nonzero()[:, 0].tolist())
    assert tree.diagonal().all()
    assert int(tree.sum()) == sum(len(path) for path in paths_of(forest))


def paths_of(forest):
    """Return the tokens each token of the stream sees, by walking up parents."""
    paths = [list(range(i + 1)) for root in forest.roots for i in range(len(root.tokens))]
    for group in forest.groups:
        above = len(forest.roots[group.root].tokens)
        paths += [[0] * (above + depth + 1) for depth in group.depths]
    return paths


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", only(["mistral"], ["llama", "gpt2", "mistral"]))
def test_the_gpu_kernel_gives_the_same_numbers(name, monkeypatch):
    """FlexAttention has no backward on the CPU; its forward there is compared with the blocks'."""
    from softprompt.engine.forest import forest_attention as attention

    model = model_of(name)
    rows = [
        RowCase((5, 6, 7, 9, 9), (8, 2)),
        RowCase((5, 9), (8, 4, 2), 1),
        RowCase((5, 9), (8, 5), 1),
    ]
    prompts = [p.detach() for p in prompts_for(model, 5, 3)]
    with torch.no_grad():
        expected = ForestEngine(Base(model)).target_log_probs(engine_rows(rows, prompts)).values
        calls = []

        def with_flex(module, query, key, value, attention_mask, scaling=None, **kwargs):
            calls.append(1)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            mixed = attention.attend_flex(query, key, value, attention_mask.flex(), scale)
            return mixed.transpose(1, 2).contiguous(), None

        attention.AttentionInterface.register(attention.NAME, with_flex)
        try:
            got = ForestEngine(Base(model)).target_log_probs(engine_rows(rows, prompts)).values
        finally:
            attention.AttentionInterface.register(attention.NAME, attention.forest_attention_forward)
    assert calls
    torch.testing.assert_close(got, expected, **CLOSE)
