"""What is trained in the place of rows: its start, its size, and what is left of it in a file."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from softprompt import PromptEmbedding, PromptTuningConfig
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import build_prompt
from softprompt.prompts.methods.parameterisations import FixedBasis, LowRank, Residual, Superposition

V, H, P = 21, 12, 6
KINDS = {
    "low_rank": {"parameterization": "low_rank", "parameterization_rank": 3},
    "ulpt": {"parameterization": "ulpt", "parameterization_rank": 4},
    "residual": {"parameterization": "residual"},
    "superpos": {"parameterization": "superpos", "parameterization_rank": 15},
}


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(V, H)


def prompt(table, kind=None, seed=None, **changes):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **KINDS.get(kind, {}), **changes)
    return build_prompt(config, table, generator=generator)


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_are_the_papers():
    """11.2K and 925K on T5-Large (Xiao et al. 2023, figure 1); P r + 2 H, 7.9k on T5-Base (Wu et al. 2025)."""
    large = torch.randn(100, 1024)
    assert size(LowRank(large, 10)) == 100 * 10 + 10 * 1024 == 11_240
    assert size(Residual(large)) == 925_072
    assert size(FixedBasis(torch.randn(100, 768), 64, seed=1)) == 100 * 64 + 2 * 768 == 7_936


def test_residual_and_direct_start_at_the_rows(table):
    direct = prompt(table, seed=4).materialize()
    assert torch.equal(prompt(table, "residual", seed=4).materialize(), direct)
    assert prompt(table).embedding.weight.shape == (P, H)


def test_superpos_is_a_mixture_of_sampled_embeddings_that_starts_at_the_first_values(table):
    direct = prompt(table, seed=4, prompt_tuning_init="SAMPLE_VOCAB").materialize().detach()
    made = prompt(table, "superpos", seed=4, prompt_tuning_init="SAMPLE_VOCAB")
    assert torch.allclose(made.materialize(), direct, atol=1e-6)
    behind = made.parameterisation
    unit = behind.weights[0, 0].item()  # the weights begin as a unit matrix in this unit
    vocabulary = table.weight.detach()
    nearest = torch.cdist(behind.basis * unit, vocabulary).min(dim=1)
    assert nearest.values.max() < 1e-5  # all that is mixed are tokens
    with torch.no_grad():
        behind.weights.normal_()
    tokens = vocabulary[nearest.indices]
    mixture = sum(behind.weights[:, j, None] / unit * tokens[j] for j in range(15))
    assert torch.allclose(made.materialize(), mixture, atol=1e-5)
    assert {name for name, _ in behind.named_parameters()} == {"weights"}


def test_a_step_of_the_weights_moves_an_embedding_as_a_step_of_its_own():
    torch.manual_seed(0)
    made = Superposition(torch.randn(4, 64) * 3, 40, lambda count: torch.randn(count, 64) * 3)
    before = made.embeddings().detach()
    with torch.no_grad():
        made.weights += 0.1 * torch.randn_like(made.weights).sign()
    moved = (made.embeddings().detach() - before).square().mean().sqrt()
    assert 0.08 < float(moved) < 0.12


def test_superpos_needs_room_for_its_start_and_has_the_papers_default(table):
    with pytest.raises(ConfigError, match="parameterization_rank 5 of superpos"):
        prompt(table, parameterization="superpos", parameterization_rank=5)
    assert prompt(table, parameterization="superpos").parameterisation.weights.shape == (P, 128)


def test_low_rank_starts_at_the_best_approximation(table):
    direct = prompt(table, seed=4).materialize().detach()
    start = prompt(table, "low_rank", seed=4).materialize()
    left, sizes, right = torch.linalg.svd(direct.double(), full_matrices=False)
    best = left[:, :3] @ torch.diag(sizes[:3]) @ right[:3]
    assert torch.allclose(start.double(), best, atol=1e-4)
    missed = (start.double() - direct.double()).norm()
    assert torch.allclose(missed, sizes[3:].square().sum().sqrt(), rtol=1e-4)
    assert torch.allclose(LowRank(direct, P).embeddings(), direct, atol=1e-5)


def test_ulpt_starts_at_the_nearest_rows_of_its_basis(table):
    direct = prompt(table, seed=4).materialize().detach()
    start = prompt(table, "ulpt", seed=4)
    basis = start.parameterisation.basis
    projection = direct @ basis.T @ torch.linalg.inv(basis @ basis.T) @ basis
    assert torch.allclose(start.materialize(), projection, atol=1e-5)
    assert torch.allclose(FixedBasis(direct, H, seed=1).embeddings(), direct, atol=1e-4)


def test_the_basis_comes_from_its_seed_and_is_not_trained(table):
    made = prompt(table, "ulpt").parameterisation
    drawn = torch.randn(4, H, generator=torch.Generator().manual_seed(made.seed)) / 2
    assert torch.equal(made.basis, drawn)
    assert "basis" in dict(made.named_buffers())
    assert {name for name, _ in made.named_parameters()} == {"z", "scale", "shift"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_alone_decides(table, kind):
    one, same, other = (prompt(table, kind, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_a_target_and_bakes(table, kind, caplog):
    made = prompt(table, kind, seed=1)
    aim = torch.randn(P, H, generator=torch.Generator().manual_seed(9))
    optimiser = torch.optim.Adam(made.parameters(), lr=0.05)
    first = (made.materialize() - aim).square().mean().item()
    for _ in range(60):
        optimiser.zero_grad()
        (made.materialize() - aim).square().mean().backward()
        optimiser.step()
    assert (made.materialize() - aim).square().mean().item() < 0.5 * first
    stored = made.stored()
    assert {name: tuple(value.shape) for name, value in stored.items()} == {"prompt_embeddings": (P, H)}
    plain = prompt(table)
    plain.load_stored(stored)
    assert torch.equal(plain.materialize(), made.materialize())
    made.requires_grad_(False)
    with caplog.at_level(logging.INFO, "softprompt"):
        made.load_stored(stored)
    assert "training goes on with the embeddings themselves" in caplog.text
    assert torch.equal(made.embedding.weight, stored["prompt_embeddings"])
    assert [(n, p.requires_grad) for n, p in made.named_parameters()] == [("embedding.weight", False)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_changes_nothing(table, kind):
    made = prompt(table, kind)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ArtifactError, match=r"is \[5, 12\], but this model needs \[6, 12\]"):
        made.load_stored({"prompt_embeddings": torch.zeros(5, H)})
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_indices(table, kind):
    made = prompt(table, kind)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301 - our own bytes
        assert torch.equal(twin.materialize(), made.materialize())
    assert torch.equal(made(torch.tensor([[3, 0]])), made.materialize()[[3, 0]][None])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_about_to_be_loaded_is_a_table(table, kind):
    assert isinstance(prompt(table, kind, inference_mode=True), PromptEmbedding)
    assert set(prompt(table, kind, inference_mode=True).state_dict()) == {"embedding.weight"}


def test_the_file_does_not_say_what_was_trained():
    for options in KINDS.values():
        config = PromptTuningConfig(num_virtual_tokens=P, **options)
        assert config.to_dict() == PromptTuningConfig(num_virtual_tokens=P).to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameterization": "low_rank", "parameterization_rank": 7}, "use at most 6"),
        ({"parameterization": "ulpt", "parameterization_rank": 13}, "use at most 12"),
    ],
)
def test_ranks_that_restrict_nothing_are_refused(table, options, message):
    with pytest.raises(ConfigError, match=message):
        prompt(table, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameterization": "low_rank"}, "parameterization_rank of low_rank takes a whole number; got None"),
        ({"parameterization": "residual", "parameterization_rank": 3}, "would be ignored"),
        ({"parameterization_rank": 3}, "would be ignored"),
        ({"parameterization": "lowrank"}, "did you mean 'low_rank'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PromptTuningConfig(**options)
