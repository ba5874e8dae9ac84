"""Encoders without padding, inside the model's own forward.

The layers between embeddings and head run on real tokens; positions, pooling and heads see the
shapes they expect. A model earns it by a probe: hidden states packed must equal those padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.backbone.facts import facts_of, recomputes_layers, skips_layers
from softprompt.engine.attention import LayerMask, forest_attention
from softprompt.engine.packed_layers import Packing, layers_of, packed_layers, relative_bias
from softprompt.engine.selfcheck import probing
from softprompt.engine.visibility import whole_rows

_PROBE = (9, 4, 6)
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_packable: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def without_padding(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Run the layers of an encoder on real tokens inside the context, where that is exact and pays.

    Args:
        model: The model; decoders are left alone.
        inputs: The arguments of the forward call inside the context.
    """
    mask = inputs.get("attention_mask")
    asked = any(_wants(model, inputs, n) for n in ("output_attentions", "output_hidden_states"))
    if mask is None or mask.dim() != 2 or bool(mask.all()) or asked or model.can_generate():
        return nullcontext()
    if recomputes_layers(model) or skips_layers(model) or why_not_packed(model):
        return nullcontext()
    return _packed(model, mask)


def _wants(model: PreTrainedModel, inputs: Mapping[str, Any], name: str) -> bool:
    given = inputs.get(name)
    return bool(getattr(model.config, name, False) if given is None else given)


@torch.no_grad()
def is_bidirectional(model: PreTrainedModel) -> bool:
    """Tell whether a token's hidden state depends on the tokens behind it."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device) % facts_of(model).vocabulary
    with probing(model):
        states = model.base_model(input_ids=ids).last_hidden_state[:, :2]
    return not torch.allclose(states[0], states[1], atol=1e-6)


def why_not_packed(model: PreTrainedModel) -> str:
    """Return why the model's layers are run padded, empty when they are packed."""
    if model not in _packable:
        try:
            with probing(model):
                _packable[model] = _probe(model)
        except Exception as cause:  # whatever a model's own code raises on our inputs
            _packable[model] = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return _packable[model]


@contextmanager
def _packed(model: PreTrainedModel, mask: Tensor) -> Iterator[None]:
    stack = model.base_model
    lengths = mask.sum(1).tolist()
    plan = whole_rows(lengths).to(mask.device)
    bias = relative_bias(stack, max(lengths))
    with (
        forest_attention(model),
        packed_layers(layers_of(stack), Packing.of(mask), LayerMask.of(plan, bias), unpack=True),
    ):
        yield


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str:
    facts = facts_of(model)
    generator = torch.Generator().manual_seed(0)
    shape = (len(_PROBE), max(_PROBE))
    ids = torch.randint(0, min(facts.vocabulary, 1000), shape, generator=generator).to(model.device)
    ids[ids == facts.pad_id] = facts.pad_id + 1
    mask = (torch.arange(shape[1]) < torch.tensor(_PROBE).unsqueeze(1)).long().to(model.device)
    ids = torch.where(mask.bool(), ids, facts.pad_id)
    states = []
    for context in (nullcontext(), _packed(model, mask)):
        with context:
            output = model.base_model(input_ids=ids, attention_mask=mask)
        states.append(output.last_hidden_state[mask.bool()].float())
    worst = float((states[0] - states[1]).abs().max())
    if not worst <= _TOLERANCE.get(model.dtype, 1e-4):
        return f"hidden states differ by {worst:.2g} on the probe"
    return ""
