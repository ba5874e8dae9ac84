"""The tensor of a request to vLLM, read the way its server reads it."""

from __future__ import annotations

import base64
import io
import json

import torch


def read_payload(path):
    """Return the tensor ``[P + T, H]`` of a request."""
    data = base64.b64decode(json.loads(path.read_text())["prompt_embeds"], validate=True)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
