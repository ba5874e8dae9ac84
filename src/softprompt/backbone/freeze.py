"""Freezing a model, and proving that it stayed frozen."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def freeze(model: nn.Module) -> None:
    """Take every parameter out of training."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 over every name, shape, dtype and byte of the model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
