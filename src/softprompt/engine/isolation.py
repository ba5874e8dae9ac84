"""Whether a model supports prompts that do not see the input, and whether they would change anything."""

from __future__ import annotations

from typing import Any

import torch

from softprompt.backbone import Base, has_windows
from softprompt.engine.selfcheck import probing


@torch.no_grad()
def is_bidirectional(base: Base) -> bool:
    """Tell whether a token's hidden state depends on the tokens behind it."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=base.device) % base.facts.vocabulary
    with probing(base):
        states = base.model.base_model(input_ids=ids).last_hidden_state[:, :2]
    return not torch.allclose(states[0], states[1], atol=1e-6)


@torch.no_grad()
def why_not_isolated(base: Base) -> str:
    """Return why no prompt of this encoder can be kept from seeing the input, empty where it can.

    Two columns that may see each other alone must not notice what stands behind them.
    """
    model = base.model
    encoder: Any = model.get_encoder() if base.is_encoder_decoder else model.base_model
    if has_windows(encoder):
        return "some of its layers see only a window, which a mask of our own would replace"
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]], device=model.device)
    mask = torch.zeros(2, 1, 4, 4, dtype=model.dtype, device=model.device)
    mask[:, :, :2, 2:] = torch.finfo(model.dtype).min
    try:
        with probing(base):
            states = encoder(
                input_ids=ids % base.facts.vocabulary, attention_mask=mask
            ).last_hidden_state
    except Exception as cause:  # whatever a model's own code raises on such a mask
        said = (str(cause).strip().splitlines() or [""])[0]
        return f"it takes no mask of our own ({type(cause).__name__}: {said})"
    if not torch.allclose(states[0, :2], states[1, :2], atol=1e-6):
        return "it ignores a mask of our own"
    return ""
