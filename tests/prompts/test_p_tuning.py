"""P-tuning: PEFT's network with PEFT's numbers, and what remains of it when it is saved."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch

from softprompt import PromptEncoder, PromptEncoderConfig
from softprompt.errors import ArtifactError, ConfigError

SIZES = {"num_virtual_tokens": 5, "token_dim": 8, "num_transformer_submodules": 1}
LSTM = {"encoder_reparameterization_type": "LSTM"}


@pytest.mark.parametrize("submodules", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"encoder_hidden_size": 6}, LSTM, {**LSTM, "encoder_num_layers": 1}],
    ids=["mlp", "narrow", "lstm", "one-layer"],
)
def test_start_and_values_equal_pefts(options, submodules):
    options = {**SIZES, "encoder_hidden_size": 8, **options}
    options["num_transformer_submodules"] = submodules
    torch.manual_seed(3)
    ours = PromptEncoder(PromptEncoderConfig(**options))
    torch.manual_seed(3)
    theirs = peft.PromptEncoder(peft.PromptEncoderConfig(**options))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    indices = torch.arange(5 * submodules)
    rows = theirs(indices[None])[0]
    assert torch.allclose(ours.materialize(), rows, atol=1e-6)
    assert torch.allclose(ours(indices[None])[0], rows, atol=1e-6)
    assert torch.allclose(ours.stored()["prompt_embeddings"], rows, atol=1e-6)


def test_the_hidden_size_is_the_width_unless_given():
    assert PromptEncoder(PromptEncoderConfig(**SIZES)).mlp_head[0].out_features == 8


def test_gradients_reach_rows_and_network():
    encoder = PromptEncoder(PromptEncoderConfig(**SIZES, **LSTM))
    encoder.materialize().square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in encoder.parameters())


def test_dropout_acts_while_training_only():
    encoder = PromptEncoder(PromptEncoderConfig(**SIZES, **LSTM, encoder_dropout=0.5))
    assert not torch.equal(encoder.materialize(), encoder.materialize())
    assert torch.equal(encoder.stored()["prompt_embeddings"], encoder.stored()["prompt_embeddings"])
    assert encoder.training
    encoder.eval()
    # Without gradients torch's LSTM takes another path, a rounding away.
    assert torch.allclose(encoder.materialize(), encoder.stored()["prompt_embeddings"], atol=1e-6)


@pytest.mark.parametrize("options", [{}, LSTM], ids=["mlp", "lstm"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_loaded_rows_are_a_table(options, inference_mode, caplog):
    stored = PromptEncoder(PromptEncoderConfig(**SIZES, **options)).stored()
    loaded = PromptEncoder(PromptEncoderConfig(**SIZES, **options, inference_mode=inference_mode))
    with caplog.at_level(logging.INFO, "softprompt"):
        loaded.load_stored(stored)
    assert torch.equal(loaded.materialize(), stored["prompt_embeddings"])
    assert [name for name, _ in loaded.named_parameters()] == ["embedding.weight"]
    assert loaded.embedding.weight.requires_grad
    assert ("without the" in caplog.text) is not inference_mode


def test_what_does_not_fit_is_refused_and_changes_nothing():
    encoder = PromptEncoder(PromptEncoderConfig(**SIZES))
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(ArtifactError, match=r"is \[4, 8\], but this model needs \[5, 8\]"):
        encoder.load_stored({"prompt_embeddings": torch.zeros(4, 8)})
    assert encoder.state_dict().keys() == before.keys()
    with pytest.raises(ConfigError, match="task_ids go from 0 to 0"):
        encoder.materialize(1)


def test_a_generator_alone_decides():
    def drawn(seed):
        return PromptEncoder(
            PromptEncoderConfig(**SIZES), generator=torch.Generator().manual_seed(seed)
        ).materialize()

    first = drawn(1)
    state = torch.random.get_rng_state()
    assert torch.equal(drawn(1), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(drawn(2), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_dropout": 1.0}, "must be below 1"),
        ({"encoder_reparameterization_type": "LSMT"}, "did you mean 'LSTM'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size must be at least 1; got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        PromptEncoderConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_num_layers": 3}, "encoder_num_layers=3 would be ignored with MLP"),
        ({"encoder_dropout": 0.1}, r"encoder_dropout=0\.1 would be ignored"),
        ({**LSTM, "encoder_num_layers": 1, "encoder_dropout": 0.1}, "would be ignored"),
    ],
)
def test_settings_that_would_be_ignored_are_taken_as_pefts_and_refused_where_tune_asks(options, message):
    config = PromptEncoderConfig(**SIZES, **options)
    with pytest.raises(ConfigError, match=message):
        config.refuse_ignored()


def test_layers_that_an_mlp_does_not_have_are_warned_of():
    with pytest.warns(UserWarning, match="for MLP, the argument `encoder_num_layers` is ignored. Exactly 2"):
        PromptEncoder(PromptEncoderConfig(**SIZES, encoder_num_layers=3))


def test_sizes_are_needed():
    with pytest.raises(ConfigError, match="P-tuning needs num_virtual_tokens and token_dim"):
        PromptEncoder(PromptEncoderConfig(num_virtual_tokens=3))
