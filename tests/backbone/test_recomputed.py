"""Layers that backward runs again keep the attention of their pass, also when backward fails."""

from __future__ import annotations

import pytest
import torch

from oracles.families import causal
from oracles.rows import RowCase, engine_rows
from softprompt.backbone import Base, facts_of
from softprompt.engine import ForestEngine, PlainEngine

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
ROWS = [RowCase((5, 6, 7, 8), (8, 2), 0), RowCase((5, 9), (8, 4, 2), 1)]
STILL = {
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
"""Dropout of training mode, off."""

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prompts_for(model, *, trained=True):
    generator = torch.Generator().manual_seed(4)
    width = facts_of(model).token_dim
    return [torch.randn(n, width, generator=generator).requires_grad_(trained) for n in (5, 3)]


def checkpointed(name, reentrant=False):
    model = causal(name, **STILL.get(name, {})).requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_equal_the_pass_without_checkpointing(name, reentrant):
    model = causal(name).requires_grad_(False)
    prompts = prompts_for(model)
    expected = torch.autograd.grad(
        ForestEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts)).values.sum(), prompts
    )
    model = checkpointed(name, reentrant)
    values = ForestEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts)).values
    assert model.config._attn_implementation == "sdpa"
    values.sum().backward()
    for prompt, theirs in zip(prompts, expected, strict=True):
        torch.testing.assert_close(prompt.grad, theirs, **CLOSE)


def test_a_backward_that_raises_leaves_nothing_behind():
    model = checkpointed("llama")
    engine, prompts = ForestEngine(Base(model)), prompts_for(model)
    expected = torch.autograd.grad(engine.target_log_probs(engine_rows(ROWS, prompts)).values.sum(), prompts[0])[0]
    values = engine.target_log_probs(engine_rows(ROWS, prompts)).values
    calls = []

    def fail(*_):
        calls.append(model.config._attn_implementation)
        raise KeyError("midway")

    handle = model.model.layers[0].self_attn.register_forward_hook(fail)
    with pytest.raises(KeyError, match="midway"):
        values.sum().backward()
    handle.remove()
    assert calls == ["softprompt_forest"]
    assert model.config._attn_implementation == "sdpa"
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()
    again = torch.autograd.grad(engine.target_log_probs(engine_rows(ROWS, prompts)).values.sum(), prompts[0])[0]
    torch.testing.assert_close(again, expected, **CLOSE)


def test_a_failing_pass_gives_the_checkpoint_function_back():
    model = checkpointed("llama")
    before = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ForestEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts_for(model)))
    handle.remove()
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == before


def test_two_engines_in_one_backward():
    model = checkpointed("llama")
    prompts = prompts_for(model)
    loss = sum(
        engine.target_log_probs(engine_rows(ROWS, prompts)).values.sum()
        for engine in (ForestEngine(Base(model)), PlainEngine(Base(model), trusted=True))
    )
    twice = torch.autograd.grad(loss, prompts)
    once = torch.autograd.grad(
        PlainEngine(Base(model), trusted=True).target_log_probs(engine_rows(ROWS, prompts)).values.sum(),
        prompts,
    )
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, 2 * b, **CLOSE)


def test_a_part_of_the_model_that_trains_itself():
    """No prompt has a gradient; the layers are run again all the same."""
    model = checkpointed("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    prompts = prompts_for(model, trained=False)
    grads = []
    for engine in (ForestEngine(Base(model)), PlainEngine(Base(model), trusted=True)):
        model.zero_grad()
        engine.target_log_probs(engine_rows(ROWS, prompts)).values.sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, **CLOSE)
