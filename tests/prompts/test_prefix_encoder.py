"""The module and the configuration of prefix tuning, apart from any model."""

from __future__ import annotations

import pytest
import torch

from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import PeftConfig, PrefixEncoder, PrefixTuningConfig

P, L, A, D = 3, 2, 2, 4
SIZES = {"num_virtual_tokens": P, "num_layers": L, "num_attention_heads": A, "token_dim": A * D}


def encoder(task="CAUSAL_LM", **options):
    return PrefixEncoder(PrefixTuningConfig(task_type=task, **SIZES, **options))


def test_the_order_of_the_values_is_pefts():
    """PEFT reads a token's row as layer 0's keys, layer 0's values, layer 1's keys ..., heads inside."""
    made = encoder()
    rows = torch.arange(P * L * 2 * A * D, dtype=torch.float32).view(P, -1)
    made.load_stored({"prompt_embeddings": rows})
    value = made.materialize()
    assert value.shape == (L, 2, A, P, D)
    for token in range(P):
        for layer in range(L):
            for part in range(2):
                at = (2 * layer + part) * A * D
                expected = rows[token, at : at + A * D].view(A, D)
                assert torch.equal(value[layer, part, :, token], expected)
    assert torch.equal(made.stored()["prompt_embeddings"], rows)


def test_a_seq2seq_file_has_every_second_layer_empty():
    made = encoder("SEQ_2_SEQ_LM")
    rows = made.stored()["prompt_embeddings"]
    assert rows.shape == (P, 2 * L * 2 * A * D)
    layers = rows.view(P, 2 * L, -1)
    assert not layers[:, 1::2].any()
    assert torch.equal(layers[:, ::2].flatten(1), made.embedding.weight)
    again = encoder("SEQ_2_SEQ_LM")
    again.load_stored({"prompt_embeddings": rows})
    assert torch.equal(again.materialize(), made.materialize())
    tied = torch.randn(P, L * 2 * A * D)
    again.load_stored({"prompt_embeddings": tied})
    read = tied.view(P, L, -1)[:, [0, 0]]  # layer 2 l, taken round
    assert torch.equal(again.embedding.weight, read.flatten(1))


def test_a_generator_decides_everything():
    made = [
        PrefixEncoder(
            PrefixTuningConfig(task_type="CAUSAL_LM", prefix_projection=True, **SIZES),
            generator=torch.Generator().manual_seed(3),
        )
        for _ in range(2)
    ]
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(made[0].materialize(), made[1].materialize())


def test_the_frozen_first_token_is_that_of_what_was_loaded_last():
    options = {"prefix_tuning_init_text": "x", "tokenizer_name_or_path": "x", "freeze_first_token": True}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", **SIZES, **options)
    made = PrefixEncoder(config, text=torch.ones(L, 2, A, P, D))
    rows = torch.randn(P, L * 2 * A * D, generator=torch.Generator().manual_seed(0))
    made.load_stored({"prompt_embeddings": rows})
    assert torch.equal(made.stored()["prompt_embeddings"], rows)
    made.materialize().sum().backward()
    moved = made.embedding.weight.grad.abs().amax(dim=1) > 0
    assert moved.tolist() == [False, True, True]


def test_what_cannot_be_loaded():
    with pytest.raises(ArtifactError, match="do not tell the parameters of prefix_projection"):
        encoder(prefix_projection=True).load_stored({"prompt_embeddings": torch.zeros(P, 32)})
    with pytest.raises(ArtifactError, match="was the prompt made for another base"):
        encoder().load_stored({"prompt_embeddings": torch.zeros(P, 48)})
    with pytest.raises(ArtifactError, match="was the prompt made for another base"):
        encoder("SEQ_2_SEQ_LM").load_stored({"prompt_embeddings": torch.zeros(P, 3 * 16)})
    with pytest.raises(ArtifactError, match="lacks prompt_embeddings"):
        encoder().load_stored({})


def test_what_cannot_be_made():
    with pytest.raises(ConfigError, match="num_layers is missing"):
        PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="not a multiple"):
        PrefixEncoder(PrefixTuningConfig(**{**SIZES, "num_attention_heads": 3}))
    text = {"prefix_tuning_init_text": "a", "tokenizer_name_or_path": "b"}
    with pytest.raises(ConfigError, match="the text's keys and values must be"):
        PrefixEncoder(PrefixTuningConfig(**SIZES, **text), text=torch.zeros(L, 2, A, 5, D))
    with pytest.raises(ConfigError, match="task_ids go from 0 to 0"):
        encoder().materialize(1)


def test_a_config_round_trips():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=7, **SIZES)
    assert PeftConfig.from_dict(config.to_dict()) == config
    text = PrefixTuningConfig(prefix_tuning_init_text="a", tokenizer_name_or_path="b", freeze_first_token=True)
    written = text.to_dict()
    assert written.keys() == config.to_dict().keys()
    assert not {"prefix_tuning_init_text", "freeze_first_token", "tokenizer_kwargs"} & set(written)
    seq2seq = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", **SIZES).to_dict()
    assert (seq2seq["num_layers"], seq2seq["num_transformer_submodules"]) == (2 * L, 2)
    with pytest.raises(ConfigError, match="prefix_projecton"):
        PeftConfig.from_dict({"peft_type": "PREFIX_TUNING", "prefix_projecton": True})
