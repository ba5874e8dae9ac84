"""Context-aware prompt tuning: PEFT's values, gradients, trajectory and loss."""

from __future__ import annotations

import types
import warnings

import peft
import pytest
import torch
from torch import nn

from softprompt import CPTConfig, CPTEmbedding
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import cpt_columns, cpt_loss

V, H = 13, 8
IDS = [3, 4, 5, 6, 7, 8, 9, 10, 11]
TYPES = [0, 1, 2, 3, 4, 5, 6, 7, 8]
CONTEXT = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": IDS,
    "cpt_mask": [1] * 9,
    "cpt_tokens_type_mask": TYPES,
    "opt_projection_epsilon": 0.2,
    "opt_projection_format_epsilon": 0.1,
}


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(V, H)


def pair(table, **changes):
    """Return ours and PEFT's module with equal, random moves, some in their balls and some outside."""
    options = CONTEXT | changes
    ours = CPTEmbedding(CPTConfig(**options), table)
    config = peft.CPTConfig(**options)
    config.token_dim = H
    theirs = peft.CPTEmbedding(config, table)
    moves = torch.randn(9, H, generator=torch.Generator().manual_seed(1))
    moves *= torch.tensor([1, 0.001, 1, 0.001, 1, 0, 0.001, 1, 1])[:, None]
    for module in (ours, theirs):
        module.delta_embedding.weight.data.copy_(moves)
    return ours, theirs


def test_the_context_starts_at_its_tokens(table):
    ours = CPTEmbedding(CPTConfig(**CONTEXT), table)
    assert torch.equal(ours.materialize(), table.weight[IDS])
    assert set(ours.state_dict()) == {"embedding.weight", "delta_embedding.weight"}
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["delta_embedding.weight"]
    assert ours.fixed == ("embedding.weight",)


def test_value_and_gradient_equal_pefts(table):
    ours, theirs = pair(table)
    before = ours.delta_embedding.weight.detach().clone()
    indices = torch.arange(9)
    weights = torch.randn(9, H)
    (ours.materialize() * weights).sum().backward()
    (theirs(indices) * weights).sum().backward()
    assert torch.allclose(ours(indices), theirs(indices), atol=1e-7)
    mine, other = ours.delta_embedding.weight.grad, theirs.delta_embedding.weight.grad
    assert torch.equal(mine, other)
    assert torch.equal(mine[[0, 4, 8]], torch.zeros(3, H))
    assert torch.equal(ours.delta_embedding.weight, before)
    ours.project_()
    assert torch.allclose(ours.delta_embedding.weight, theirs.delta_embedding.weight, atol=1e-8)


def test_the_trajectory_equals_pefts_with_project(table):
    ours, theirs = pair(table)
    target = torch.randn(9, H)
    optimisers = [torch.optim.AdamW(m.delta_embedding.parameters(), lr=0.02) for m in (ours, theirs)]
    for _ in range(20):
        for module, optimiser in zip((ours, theirs), optimisers, strict=True):
            if module is ours:
                ours.project_()
            optimiser.zero_grad()
            (module(torch.arange(9)) - target).square().sum().backward()
            optimiser.step()
    assert torch.allclose(ours(torch.arange(9)), theirs(torch.arange(9)), atol=1e-6)


def test_the_projection_and_its_radius_are_pefts(table):
    ours, theirs = pair(table)
    torch.testing.assert_close(ours.get_projection(), theirs.get_projection())
    torch.testing.assert_close(ours.get_epsilon(), theirs.get_epsilon().to(ours.get_epsilon().dtype))


def test_a_radius_of_zero_holds_tokens_still(table):
    ours, _ = pair(table, opt_projection_epsilon=0.0)
    ours.delta_embedding.weight.data[6] = 0
    assert torch.equal(ours.materialize()[[2, 6]], table.weight[[5, 9]])


def test_stored_values_come_back_as_the_centre(table):
    ours, theirs = pair(table)
    stored = ours.stored()
    assert set(stored) == {"prompt_embeddings"}
    assert torch.allclose(stored["prompt_embeddings"], theirs(torch.arange(9)), atol=1e-7)
    loaded = CPTEmbedding(CPTConfig(**CONTEXT, inference_mode=True), table)
    loaded.load_stored(stored)
    assert torch.equal(loaded.materialize(), stored["prompt_embeddings"])
    with pytest.raises(ArtifactError, match="lacks prompt_embeddings"):
        loaded.load_stored({})


@pytest.mark.parametrize("weighting", ["none", "decay"])
def test_the_loss_equals_pefts(weighting):
    factor = 0.7 if weighting == "decay" else 1.0
    config = CPTConfig(**CONTEXT, opt_weighted_loss_type=weighting, opt_loss_decay_factor=factor)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, V, (3, 6), generator=generator)
    labels[1, 4:] = -100
    text_types = torch.tensor([[1, 2, 2, 3, 4, 4], [2, 3, 4, 4, 0, 0], [4, 4, 1, 2, 3, 8]])
    logits = torch.randn(3, 15, V, generator=generator)
    mine, all_types = cpt_columns(config, labels, text_types)
    kept = text_types.clone()
    ours = cpt_loss(logits, mine, all_types, config)
    assert torch.equal(text_types, kept)

    prefix = torch.tensor(IDS).expand(3, -1)
    types_ = torch.cat([torch.tensor(TYPES).expand(3, -1), text_types + 8 * (text_types > 0)], dim=1)
    full = torch.cat([prefix, labels], dim=1)
    full[~((types_ > 0) & (types_ % 4 == 0))] = -100
    assert torch.equal(mine, full)
    assert torch.equal(all_types, types_)
    output = types.SimpleNamespace(logits=logits, loss=None)
    theirs = peft.CPTEmbedding.calculate_loss(output, full, types_, config).loss
    assert abs(float(ours) - float(theirs)) < 1e-5


def test_columns_follow_a_layout():
    """Left padding: the context stands directly before the text, not at column 0."""
    config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_tokens_type_mask=[2, 4])
    context = torch.tensor([[-1, -1, 0, 1, -1]])
    text = torch.tensor([[0, 1, -1, -1, 2]])
    labels = torch.tensor([[-100, -100, 9]])
    all_labels, all_types = cpt_columns(config, labels, torch.tensor([[0, 0, 4]]), context=context, text=text)
    assert all_labels.tolist() == [[-100, -100, -100, 6, 9]]
    assert all_types.tolist() == [[0, 0, 2, 4, 8]]


def test_labels_survive_a_context_that_ends_in_another_type():
    """PEFT adds the last type as it is: types 1 make the text's labels 5, which are none."""
    config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6])
    labels = torch.tensor([[7, 8, 9]])
    all_labels, all_types = cpt_columns(config, labels)
    assert all_labels.tolist() == [[-100, -100, 7, 8, 9]]
    assert all_types.tolist() == [[1, 1, 8, 8, 8]]
    assert bool(cpt_loss(torch.randn(1, 5, V), all_labels, all_types, config).isfinite())


def test_types_of_another_shape_are_refused():
    config = CPTConfig(**CONTEXT)
    with pytest.raises(ConfigError, match=r"input_type_mask must have the shape of labels, \[1, 3\]"):
        cpt_columns(config, torch.zeros(1, 3).long(), torch.ones(1, 2).long())


def test_tokens_beyond_the_vocabulary_are_refused(table):
    with pytest.raises(ConfigError, match="cpt_token_ids holds 13, the base's vocabulary ends at 12"):
        CPTEmbedding(CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[13]), table)


@pytest.mark.parametrize(
    "options",
    [
        {"task_type": "SEQ_CLS"},
        {},
        {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1]},
    ],
)
def test_error_texts_are_pefts(options):
    with pytest.raises(ConfigError) as ours:
        CPTConfig(**options)
    with pytest.raises(ValueError) as theirs, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.CPTConfig(**options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 3}, "got 3 and 9 token ids"),
        ({"opt_weighted_loss_type": "linear"}, "one of none, decay, got 'linear'"),
        ({"opt_projection_epsilon": -1}, "opt_projection_epsilon must be at least 0; got -1"),
        ({"cpt_tokens_type_mask": [-1] * 9}, "each of cpt_tokens_type_mask must be at least 0; got -1"),
        ({"cpt_token_ids": [], "cpt_mask": [], "cpt_tokens_type_mask": []}, "at least one token"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CPTConfig(**(CONTEXT | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpt_mask": [0] + [1] * 8}, "cpt_mask must be all ones"),
        ({"opt_loss_decay_factor": 0.5}, "would be ignored with opt_weighted_loss_type none"),
    ],
)
def test_settings_that_would_be_ignored_are_taken_as_pefts_and_refused_where_tune_asks(options, message):
    config = CPTConfig(**(CONTEXT | options))
    with pytest.raises(ConfigError, match=message):
        config.refuse_ignored()
