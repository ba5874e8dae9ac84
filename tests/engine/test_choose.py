"""The engine is chosen by proof, and what fails it falls back with the reason."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import transformers as tf

from oracles.families import CAUSAL, GQA, IDS, OUTSIDE, SEQ2SEQ, H, L, V, build, causal, seq2seq
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from softprompt.backbone import Base
from softprompt.engine import TargetLogProbs, build_engine, choose, choose_engine
from softprompt.errors import ConfigError


@pytest.mark.parametrize("name", only(["gpt2", "llama", "gemma3", "bloom", "gptj", "mpt"], CAUSAL))
def test_causal_models(name):
    choice = choose_engine(Base(causal(name)))
    assert choice.name == ("expand" if name in OUTSIDE else "forest")
    assert bool(choice.reason) == (choice.name != "forest")


@pytest.mark.parametrize("name", only(["t5", "bart"], SEQ2SEQ))
def test_seq2seq_models(name):
    assert choose_engine(Base(seq2seq(name))).name == "forest"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        tf.MambaConfig(vocab_size=V, hidden_size=H, num_hidden_layers=L, state_size=4, **IDS),
        pytest.param(
            tf.JambaConfig(
                **{**GQA, "num_hidden_layers": 2},
                attn_layer_period=2,
                attn_layer_offset=1,
                num_experts=2,
                mamba_d_state=4,
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mamba", "jamba"],
)
def test_recurrent_models_run_plain_and_say_why(config, caplog):
    model = build(tf.AutoModelForCausalLM, config)
    with caplog.at_level(logging.INFO, logger="softprompt.engine.choose"):
        choice = choose_engine(Base(model))
    assert choice.name == "plain"
    assert "forest:" in choice.reason and "expand:" in choice.reason
    choose_engine(Base(model))
    ours = [r.message for r in caplog.records if r.name == "softprompt.engine.choose"]
    assert ours == [f"engine plain for {type(model).__name__} ({choice.reason})"]


def test_a_wrong_engine_is_caught(monkeypatch):
    class Wrong:
        name = "forest"

        def __init__(self, base):
            self._inner = choose.PlainEngine(base)

        def target_log_probs(self, rows):
            off = [
                row if row.prompt is None else replace(row, prompt=row.prompt.map(lambda p: p + 0.01))
                for row in rows
            ]
            right = self._inner.target_log_probs(off)
            return TargetLogProbs(right.values, right.row_index)

    monkeypatch.setitem(choose._FAST, "forest", Wrong)
    choice = choose_engine(Base(causal("llama", seed=5)))
    assert choice.name == "expand"
    assert "on the probe" in choice.reason


def test_forcing():
    model = causal("llama")
    assert build_engine(Base(model), "plain").name == "plain"
    assert build_engine(Base(model), "expand").name == "expand"
    assert build_engine(Base(model), "forest").name == build_engine(Base(model)).name == "forest"
    with pytest.raises(ConfigError, match="did you mean 'forest'"):
        build_engine(Base(model), "forrest")
    with pytest.raises(ConfigError, match="cannot run this model"):
        build_engine(Base(causal("bloom")), "forest")


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
@pytest.mark.parametrize("kind", only(["forest"], ["forest", "expand", "plain"]))
def test_rope_that_depends_on_the_length_of_the_batch(rope, kind):
    """Past the original length these models change all positions; a row must not notice its neighbours."""
    if rope == "longrope":
        factors = [1.0 + i for i in range(4)]
        parameters = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": factors,
            "long_factor": [4 * f for f in factors],
            "original_max_position_embeddings": 16,
        }
        config = tf.Phi3Config(**{**GQA, "max_position_embeddings": 64}, original_max_position_embeddings=16)
    else:
        parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        config = tf.LlamaConfig(**{**GQA, "max_position_embeddings": 64})
    config.rope_parameters = parameters
    model = build(tf.AutoModelForCausalLM, config).requires_grad_(False)
    prompts = [torch.randn(4, H)]
    short, long = RowCase((5, 6, 7), (8, 2)), RowCase(tuple(range(3, 33)), (8, 2))
    engine = build_engine(Base(model), kind)
    alone = torch.cat([engine.target_log_probs(engine_rows([row], prompts)).values for row in (short, long)])
    together = engine.target_log_probs(engine_rows([short, long], prompts)).values
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    plain = build_engine(Base(model), "plain").target_log_probs(engine_rows([short, long], prompts)).values
    torch.testing.assert_close(together, plain, atol=1e-5, rtol=1e-5)
