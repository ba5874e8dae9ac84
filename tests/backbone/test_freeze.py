"""Freezing, and the hash that proves it."""

from __future__ import annotations

import torch
from torch import nn

from oracles.families import causal
from oracles.weights import weights_hash
from softprompt.backbone import freeze


def test_everything_is_frozen():
    model = causal("llama")
    freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_equal_weights_have_equal_hashes():
    assert weights_hash(causal("gpt2")) == weights_hash(causal("gpt2"))
    assert weights_hash(causal("gpt2")) != weights_hash(causal("gpt2", seed=1))


def test_one_bit_a_name_or_a_dtype_changes_the_hash():
    layer = nn.Linear(3, 2)
    before = weights_hash(layer)
    with torch.no_grad():
        layer.weight[1, 2] = torch.nextafter(layer.weight[1, 2], torch.tensor(9.0))
    changed = weights_hash(layer)
    assert changed != before
    assert weights_hash(nn.Sequential(layer)) != changed
    assert weights_hash(layer.to(torch.bfloat16)) != changed


def test_buffers_and_shapes_count():
    norm = nn.BatchNorm1d(2)
    before = weights_hash(norm)
    norm.running_mean.add_(1)
    assert weights_hash(norm) != before
    flat, square = nn.Linear(1, 4, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        square.weight.copy_(flat.weight.reshape(2, 2))
    assert weights_hash(flat) != weights_hash(square)


def test_scalars_and_non_contiguous_tensors_are_hashed():
    module = nn.Module()
    module.register_buffer("scalar", torch.tensor(3.0))
    module.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    assert len(weights_hash(module)) == 64
