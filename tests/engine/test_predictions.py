"""Logits and last hidden states of every engine, against transformers' own of each row alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from oracles.families import SEQ2SEQ, causal, seq2seq
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from softprompt.backbone import Base, facts_of
from softprompt.engine import build_engine
from softprompt.errors import BackboneError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ROWS = [
    RowCase((5, 6, 7, 8), (8, 9, 2)),
    RowCase((5, 6, 7, 8), (8, 4, 2)),
    RowCase((5, 9), (7,), 1),
    RowCase((5, 9, 3), (7, 2), -1),
]
PAIRS = [(name, kind) for name in ("llama", "gemma2", "t5", "bart") for kind in ("plain", "forest")]


def setting(name):
    model = (seq2seq if name in SEQ2SEQ else causal)(name).requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    width = facts_of(model).token_dim
    return model, [torch.randn(n, width, generator=generator).requires_grad_() for n in (5, 3)]


@pytest.mark.parametrize(
    ("name", "kind"),
    only(
        [("llama", "forest"), ("gemma2", "forest"), ("t5", "forest"), ("t5", "plain"), ("gptj", "expand")],
        [*PAIRS, ("gptj", "expand"), ("llama", "expand")],
    ),
)
def test_logits_give_the_log_probs_and_hidden_states_the_logits(name, kind):
    model, prompts = setting(name)
    engine = build_engine(Base(model), kind)
    scored, outputs = (
        engine.target_log_probs(engine_rows(ROWS, prompts)),
        engine.target_outputs(engine_rows(ROWS, prompts)),
    )
    assert outputs.labels.tolist() == [token for row in ROWS for token in row.target]
    assert outputs.row_index.tolist() == scored.row_index.tolist()
    assert outputs.logits.dtype is torch.float32
    values = -F.cross_entropy(outputs.logits, outputs.labels, reduction="none")
    torch.testing.assert_close(values, scored.values, **CLOSE)
    ours = torch.autograd.grad(values.sum(), prompts, retain_graph=True)
    theirs = torch.autograd.grad(scored.values.sum(), prompts)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    logits = model.get_output_embeddings()(outputs.hidden)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    offset = getattr(model, "final_logits_bias", torch.zeros(1))
    torch.testing.assert_close(logits + offset, outputs.logits, **CLOSE)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(outputs.hidden.square().sum(), prompts))
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("name", only(["llama"], ["llama", "t5"]))
def test_every_engine_gives_the_same(name):
    model, prompts = setting(name)
    kinds = ("forest", "plain") if name == "t5" else ("forest", "expand", "plain")
    found = [build_engine(Base(model), kind).target_outputs(engine_rows(ROWS, prompts)) for kind in kinds]
    for other in found[1:]:
        torch.testing.assert_close(other.hidden, found[0].hidden, **CLOSE)
        torch.testing.assert_close(other.logits, found[0].logits, **CLOSE)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reads", ["logits", "hidden"])
def test_under_gradient_checkpointing(reads):
    model, prompts = setting("llama")
    engine = build_engine(Base(model), "forest")

    def gradients():
        found = getattr(engine.target_outputs(engine_rows(ROWS, prompts)), reads)
        return torch.autograd.grad(found.square().sum(), prompts)

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    before = model.config._attn_implementation
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert model.config._attn_implementation == before


def test_a_model_without_a_head_is_refused(monkeypatch):
    model, prompts = setting("llama")
    engine = build_engine(Base(model), "plain")
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(BackboneError, match="has no output embeddings"):
        engine.target_outputs(engine_rows(ROWS, prompts))
