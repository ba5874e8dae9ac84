"""Whether a model supports prompts that do not see the input, and whether they would change anything."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from softprompt.backbone import facts_of, has_windows, is_encoder_decoder
from softprompt.engine.selfcheck import probing


@torch.no_grad()
def is_bidirectional(model: PreTrainedModel) -> bool:
    """Tell whether a token's hidden state depends on the tokens behind it."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device) % facts_of(model).vocabulary
    with probing(model):
        states = model.base_model(input_ids=ids).last_hidden_state[:, :2]
    return not torch.allclose(states[0], states[1], atol=1e-6)


@torch.no_grad()
def why_not_isolated(model: PreTrainedModel) -> str:
    """Return why no prompt of this encoder can be kept from seeing the input, empty where it can.

    Two columns that may see each other alone must not notice what stands behind them.
    """
    encoder = model.get_encoder() if is_encoder_decoder(model) else model.base_model
    if has_windows(encoder):
        return "some of its layers see only a window, which a mask of our own would replace"
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]], device=model.device)
    mask = torch.zeros(2, 1, 4, 4, dtype=model.dtype, device=model.device)
    mask[:, :, :2, 2:] = torch.finfo(model.dtype).min
    try:
        with probing(model):
            states = encoder(
                input_ids=ids % facts_of(model).vocabulary, attention_mask=mask
            ).last_hidden_state
    except Exception as cause:  # whatever a model's own code raises on such a mask
        said = (str(cause).strip().splitlines() or [""])[0]
        return f"it takes no mask of our own ({type(cause).__name__}: {said})"
    if not torch.allclose(states[0, :2], states[1, :2], atol=1e-6):
        return "it ignores a mask of our own"
    return ""
