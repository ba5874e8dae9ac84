"""What a base's weights are known by: nothing but prompts may change."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from softprompt.backbone.sharding import whole


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 over every name, shape, dtype and byte of the model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = whole(tensor.detach()).cpu().contiguous()
        digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
