"""Rows that carry their prompt: shared by identity, both kinds in one batch, gradients where they belong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oracles.families import SEQ2SEQ, causal, seq2seq
from oracles.prefixed import random_prefix
from oracles.slow import only
from softprompt.backbone import Base, facts_of
from softprompt.engine import (
    EngineRow,
    ForestEngine,
    PlainEngine,
    Prefixes,
    PromptTable,
    build_engine,
    choose,
)
from softprompt.engine.forest.causal_plan import causal_forest
from softprompt.engine.forest.engines import encoder_plan
from softprompt.errors import ConfigError, DataError
from softprompt.prompts import Prompt

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
V, P = 64, 4
TEXTS = [((5, 6, 7), (8, 2)), ((5, 9), (8, 4, 2)), ((5, 6, 7), (8, 4)), ((10, 11), (2,))]


def model_of(name):
    return (seq2seq if name in SEQ2SEQ else causal)(name).requires_grad_(False)


def drawn(model, *lengths, seed=4):
    generator = torch.Generator().manual_seed(seed)
    width = facts_of(model).token_dim
    return [torch.randn(n, width, generator=generator).requires_grad_() for n in lengths]


def rows_with(*prompts):
    return [EngineRow(*text, prompt) for text, prompt in zip(TEXTS, prompts, strict=False)]


def solo(model, rows):
    engine = PlainEngine(Base(model))
    return torch.cat([engine.target_log_probs([row]).values for row in rows])


def assert_equal(engine, model, rows, leaves):
    got, expected = engine.target_log_probs(rows), solo(model, rows)
    torch.testing.assert_close(got.values, expected, **CLOSE)
    assert got.row_index.tolist() == [i for i, row in enumerate(rows) for _ in row.target]
    weights = torch.arange(1.0, len(expected) + 1)
    ours, theirs = (
        torch.autograd.grad((values * weights).sum(), leaves, retain_graph=True)
        for values in (got.values, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        assert a.abs().sum() > 0


def test_the_forest_shares_a_prompt_that_is_one_object():
    values = torch.randn(P, 8)
    one = Prompt(values)
    lengths = {}
    for name, prompts in {"shared": (one, one), "equal": (one, Prompt(values))}.items():
        rows = rows_with(*prompts)
        table = PromptTable.of(prompts)
        assert table.table.shape == (P if name == "shared" else 2 * P, 8)
        lengths[name] = len(causal_forest(rows, table.ids(V)))
    # The first token of both inputs is shared too, where their prompts are one.
    assert lengths["equal"] - lengths["shared"] == P + 1


def test_equal_prompts_do_not_share_an_encoder_row_or_a_prefix():
    values, prefix = torch.randn(P, 8), torch.zeros(2, 2, 1, P, 4)
    one, other = Prompt(values), Prompt(values)
    for prompts, count in (((one, one), 1), ((one, other), 2)):
        rows = [EngineRow(TEXTS[0][0], (8, 2), prompt) for prompt in prompts]
        virtual = PromptTable.of(prompts).ids(V)
        assert len(encoder_plan(rows, virtual, sees_input=True).owned) == count
        assert len(encoder_plan(rows, virtual, sees_input=False).plan) == count * (P + 3)
    first, second = Prompt(prefix=prefix), Prompt(prefix=prefix)
    assert Prefixes.of([first, None, first]).table.shape[0] == 1
    assert Prefixes.of([first, second]).owner.tolist() == [0, 1]
    assert Prefixes.of([None, one]) is None


def test_one_prompt_is_passed_on_as_the_leaf_it_is():
    (leaf,) = drawn(model_of("llama"), P)
    prompt = Prompt(leaf)
    assert PromptTable.of([prompt, None, prompt]).table is leaf
    assert PromptTable.of([Prompt(None, leaf)], "decoder").table is leaf
    assert PromptTable.of([Prompt(None, leaf), prompt]).lengths.tolist() == [0, P]


def test_both_kinds_in_one_table_are_refused():
    values = torch.randn(P, 8)
    with pytest.raises(ConfigError, match="run them apart"):
        PromptTable.of([Prompt(values), Prompt(values, sees_input=False)])
    # Nothing in the input, nothing to see it.
    blind = [Prompt(values, sees_input=False), Prompt(None, values), None]
    assert not PromptTable.of(blind).sees_input
    assert PromptTable.of(blind[1:]).sees_input
    assert PromptTable.of(blind, "decoder").sees_input


@pytest.mark.parametrize("kind", only(["forest"], ["plain", "forest", "auto"]))
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_batch_of_both_kinds_equals_each_row_alone(name, kind):
    model = model_of(name)
    first, second, third = drawn(model, P, 3, 2)
    sees, blind = Prompt(first), Prompt(second, third, sees_input=False)
    rows = rows_with(blind, sees, blind, None) + rows_with(sees, Prompt(None, third), None, blind)
    engine = build_engine(Base(model), kind)
    assert_equal(engine, model, rows, [first, second, third])
    outputs = engine.target_outputs(rows)
    assert outputs.labels.tolist() == [token for row in rows for token in row.target]
    scored = outputs.logits.log_softmax(-1).gather(1, outputs.labels.unsqueeze(1))[:, 0]
    torch.testing.assert_close(scored, solo(model, rows), **CLOSE)
    torch.testing.assert_close(
        model.get_output_embeddings()(outputs.hidden) + getattr(model, "final_logits_bias", 0),
        outputs.logits,
        **CLOSE,
    )


def test_keys_and_values_beside_both_kinds():
    model = model_of("t5")
    first, second = drawn(model, P, 3)
    prefix = random_prefix(model, 3).requires_grad_()
    rows = rows_with(Prompt(first, sees_input=False), Prompt(prefix=prefix), Prompt(second), Prompt(first))
    assert_equal(build_engine(Base(model)), model, rows, [first, second, prefix])


def test_rows_of_one_kind_are_one_pass(monkeypatch):
    model = model_of("t5")
    engine = build_engine(Base(model), "forest")
    (values,) = drawn(model, P)
    passes = []
    encoder = model.get_encoder()
    encoder.register_forward_hook(lambda *_: passes.append(1))
    blind = Prompt(values, sees_input=False)
    engine.target_log_probs(rows_with(blind))  # probed
    passes.clear()
    engine.target_log_probs(rows_with(blind, None, Prompt(None, values), blind))
    assert len(passes) == 1
    engine.target_log_probs(rows_with(blind, None, Prompt(values), blind))
    assert len(passes) == 3


def test_the_message_names_the_row_of_the_whole_batch():
    model = model_of("t5")
    (values,) = drawn(model, P)
    rows = rows_with(Prompt(values), Prompt(values, sees_input=False), Prompt(values))
    rows[2] = replace(rows[2], source=(V + 3,))
    with pytest.raises(DataError, match="row 2 holds the id 67"):
        build_engine(Base(model), "plain").target_log_probs(rows)


def test_a_path_that_is_wrong_for_one_kind_serves_the_other(monkeypatch):
    model = model_of("t5")
    right = choose._FAST["forest"]

    class Wrong(choose.Engine):
        name = "forest"

        def __init__(self, base):
            super().__init__(base)
            self._inner = right(base)

        def run_alike(self, rows, head=None):
            if not all(row.prompt is None or row.prompt.sees_input for row in rows):
                raise RuntimeError("not this kind")
            return self._inner.run_alike(rows, head)

    monkeypatch.setitem(choose._FAST, "forest", Wrong)
    assert choose.choose_engine(Base(model)).name == "forest"
    assert choose.choose_engine(Base(model), sees_input=False).name == "plain"
    first, second = drawn(model, P, 3)
    rows = rows_with(Prompt(first), Prompt(second, sees_input=False))
    engine = build_engine(Base(model))
    assert engine.name == "forest"
    assert_equal(engine, model, rows, [first, second])
    with pytest.raises(ConfigError, match="cannot run this model: RuntimeError: not this kind"):
        build_engine(Base(model), "forest").target_log_probs(rows)


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_a_shared_prompt_gets_one_gradient_and_an_unused_one_none(name):
    model = model_of(name)
    used, unused = drawn(model, P, 3)
    prompt = Prompt(used)
    Prompt(unused)
    build_engine(Base(model)).target_log_probs(rows_with(prompt, prompt, None)).values.sum().backward()
    assert unused.grad is None
    apart = drawn(model, P)[0]
    for row in rows_with(Prompt(apart), Prompt(apart)):
        PlainEngine(Base(model)).target_log_probs([row]).values.sum().backward()
    torch.testing.assert_close(used.grad, apart.grad, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_prompts_that_are_views_of_one_parameter(name):
    """Multitask prompts share parameters, and both sides of a prompt are halves of one tensor."""
    model = model_of(name)
    shared = torch.nn.Parameter(drawn(model, 2 * P)[0].detach())
    scales = torch.nn.Parameter(torch.tensor([0.5, 2.0]))

    def prompts():
        values = [shared * scale for scale in scales]
        if name == "t5":
            return [Prompt(value[:P], value[P:]) for value in values]
        return [Prompt(value) for value in values]

    rows = rows_with(*prompts(), None) + rows_with(*prompts())
    assert_equal(build_engine(Base(model)), model, rows, [shared, scales])


def test_prefixes_of_one_parameter_under_one_forest():
    model = model_of("llama")
    shared = torch.nn.Parameter(random_prefix(model, 6))
    halves = [Prompt(prefix=shared[:, :, :, :4]), Prompt(prefix=shared[:, :, :, 2:])]
    assert_equal(ForestEngine(Base(model)), model, rows_with(*halves, halves[0], None), [shared])
