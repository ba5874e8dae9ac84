"""Facts of every family, read from models rather than from names."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf

from oracles.families import CAUSAL, ENCODERS, SEQ2SEQ, A, H, L, V, build, causal, seq2seq
from oracles.slow import only
from softprompt.backbone import facts_of, input_embedding, output_limit
from softprompt.errors import BackboneError

NARROW = {"opt": 16, "electra": 16, "albert": 16}
NO_LIMIT = {"bloom", "t5", "mt5"}
"""Relative positions (T5's buckets, Bloom's ALiBi) have no end."""


def build_any(name):
    if name in CAUSAL:
        return causal(name)
    if name in SEQ2SEQ:
        return seq2seq(name)
    return build(tf.AutoModel, ENCODERS[name]())


@pytest.mark.parametrize(
    "name",
    only(
        ["gpt2", "llama", "gemma3", "gptj", "bloom", "opt", "phi", "t5", "bart", "bert", "roberta"],
        [*CAUSAL, *SEQ2SEQ, *ENCODERS],
    ),
)
def test_every_family(name):
    model = build_any(name)
    facts = facts_of(model)
    assert facts.architecture == type(model).__name__
    assert facts.is_encoder_decoder == (name in SEQ2SEQ)
    assert facts.token_dim == NARROW.get(name, H)
    assert facts.vocabulary == V
    assert (facts.num_layers, facts.num_attention_heads) == (L, A)
    assert facts.context_length == (None if name in NO_LIMIT else 64)
    rows = input_embedding(model)(torch.arange(V))
    assert facts.embedding_rms == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-5)
    assert 0 <= facts.pad_id < V
    assert facts.positions_from_ids == (name == "roberta")
    if facts.accepts_position_ids:
        ids = torch.tensor([[5, 6, 7]])
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2]]))


@pytest.mark.parametrize("name", [name for name in [*CAUSAL, *ENCODERS] if name not in NO_LIMIT])
def test_the_context_length_is_a_length_the_model_takes(name):
    model = build_any(name)
    limit = facts_of(model).context_length
    output = model(input_ids=torch.full((1, limit), 5))
    assert output[0].shape[1] == limit


def test_positions_after_the_padding_index_do_not_exist():
    model = build(tf.AutoModel, ENCODERS["roberta"]())
    assert model.config.max_position_embeddings == 66
    assert facts_of(model).context_length == 64
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 65), 5))


def test_padded_vocabulary_is_the_tables():
    model = causal("llama")
    model.resize_token_embeddings(80)
    model.config.vocab_size = V
    assert facts_of(model).vocabulary == 80


def test_a_pad_id_outside_the_table_is_not_used():
    model = causal("llama")
    model.config.pad_token_id = 99
    assert facts_of(model).pad_id == 0
    model.config.pad_token_id = None
    assert facts_of(model).pad_id == 0


def test_the_decoder_has_its_own_limit():
    assert output_limit(seq2seq("bart")) == 64
    assert output_limit(seq2seq("t5")) is None


def test_a_model_without_weights_has_no_rms():
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(CAUSAL["llama"]())
    assert math.isnan(facts_of(model).embedding_rms)


def test_a_model_without_a_table_is_refused():
    config = tf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    with pytest.raises(BackboneError, match="no input embedding table"):
        facts_of(tf.ViTModel(config))


def test_the_table_that_is_run():
    """T5 without its decoder holds its table in two modules and runs one of them."""
    model = tf.T5EncoderModel(SEQ2SEQ["t5"]()).eval()
    assert input_embedding(model) is model.encoder.embed_tokens
    called = []
    input_embedding(model).register_forward_hook(lambda *_: called.append(True))
    model(torch.tensor([[5, 6]]))
    assert called
