"""Encoders without padding, inside the model's own forward.

The layers between embeddings and head run on real tokens; positions, pooling and heads see the
shapes they expect. A model earns it by a probe: hidden states packed must equal those padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt.backbone import Base, recomputes_layers, skips_layers
from softprompt.engine.forest.attention import NAME, LayerMask, planned
from softprompt.engine.forest.layers import Packing, layers_of, packed_layers, relative_bias
from softprompt.engine.forest.visibility import Span, Visibility, padded, whole_rows
from softprompt.engine.layout import Layout
from softprompt.engine.selfcheck import probing

_PROBE = (9, 4, 6)
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def packs(base: Base, inputs: Mapping[str, Any], *, isolated: bool = False) -> bool:
    """Tell whether a forward call of an encoder runs without padding: where that is exact and pays.

    Padding then has the output the head gives for a state of zeros, so a call that reads more of
    it (hidden states, labels there) is run padded, as are decoders.

    Args:
        base: The base.
        inputs: The arguments of the call.
        isolated: Whether prompts do not see the input, so that each is computed once.
    """
    mask = inputs.get("attention_mask")
    wanted = any(_wants(base, inputs, n) for n in ("output_attentions", "output_hidden_states"))
    if mask is None or mask.dim() != 2 or wanted or torch.compiler.is_compiling():
        return False
    if bool(mask.all()) and not isolated:
        return False
    labels = inputs.get("labels")
    if labels is not None and labels.shape == mask.shape and bool((labels[mask == 0] >= 0).any()):
        return False
    return not skips_layers(base.model) and not why_not_packed(base) and _can_run_again(base)


def _wants(base: Base, inputs: Mapping[str, Any], name: str) -> bool:
    given = inputs.get(name)
    return bool(getattr(base.model.config, name, False) if given is None else given)


def _can_run_again(base: Base) -> bool:
    """Tell whether backward runs layers again, if it does, behind the hooks that pack them."""
    if not recomputes_layers(base.model):
        return True
    layers = layers_of(base.model.base_model, windows=True)
    return all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def why_not_packed(base: Base) -> str:
    """Return why the model's layers are run padded, empty when they are packed."""
    found, name = base.found, "packed encoder"
    if name not in found:
        try:
            with probing(base):
                found[name] = _probe(base)
        except Exception as cause:  # whatever a model's own code raises on our inputs
            found[name] = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return cast(str, found[name])


@contextmanager
def without_padding(base: Base, mask: Tensor, isolated: Layout | None = None) -> Iterator[None]:
    """Run the layers of an encoder on real tokens inside the context; ask ``packs`` first.

    Args:
        base: The base.
        mask: The attention mask of the call, ``[B, W]``.
        isolated: Where prompts stand that do not see the input: each is computed once.
    """
    stack = base.model.base_model
    if isolated is None:
        packing = Packing.of(mask)
        # Windows and relative positions count the columns of the padded batch.
        columns = torch.arange(mask.shape[1]).expand(mask.shape)[mask.bool().cpu()]
        plan = replace(
            whole_rows(mask.sum(1).tolist()), query_positions=columns, key_positions=columns
        )
    else:
        packing = Packing.sharing(mask, isolated.slot)
        plan = _shared_prompts(packing, isolated)
    plan = plan.to(mask.device)
    bias = relative_bias(stack, mask.shape[1])
    layers = layers_of(stack, windows=True)
    with (
        planned(plan),
        base.running(attention=NAME),
        packed_layers(layers, packing, LayerMask.of(plan, bias), unpack=True),
    ):
        yield


def _shared_prompts(packing: Packing, layout: Layout) -> Visibility:
    """Return who sees whom: a prompt itself, a row's text its prompt and itself."""
    prompts: dict[int, Span] = {}
    texts = []
    assert packing.home is not None, "prompts stand in several rows"
    home, virtual = packing.home.cpu(), (layout.slot >= 0).cpu()
    for places, own, above in zip(home, (home >= 0) & ~virtual, virtual, strict=True):
        text, prompt = places[own], places[above]
        if len(prompt):
            first = int(prompt[0])
            prompts[first] = _all_seen(prompt, prompt)
        texts.append(_all_seen(text, torch.cat([prompt, text])))
    positions = layout.positions().flatten()[packing.take].cpu()
    return padded([list(prompts.values()), texts], positions, positions)


def _all_seen(queries: Tensor, keys: Tensor) -> Span:
    return Span(queries, keys, torch.ones(len(queries), len(keys), dtype=torch.bool))


@torch.no_grad()
def _probe(base: Base) -> str:
    model, facts = base.model, base.facts
    if facts.is_encoder_decoder or model.can_generate():
        return "it is no encoder"
    generator = torch.Generator().manual_seed(0)
    shape = (len(_PROBE), max(_PROBE))
    ids = torch.randint(0, min(facts.vocabulary, 1000), shape, generator=generator).to(model.device)
    ids[ids == facts.pad_id] = facts.pad_id + 1
    mask = (torch.arange(shape[1]) < torch.tensor(_PROBE).unsqueeze(1)).long().to(model.device)
    ids = torch.where(mask.bool(), ids, facts.pad_id)
    states = []
    for context in (nullcontext(), without_padding(base, mask)):
        with context:
            output = model.base_model(input_ids=ids, attention_mask=mask)
        if getattr(output, "past_key_values", None) is not None:
            return "it fills a cache"
        states.append(output.last_hidden_state[mask.bool()].float())
    worst = float((states[0] - states[1]).abs().max())
    if not worst <= _TOLERANCE.get(model.dtype, 1e-4):
        return f"hidden states differ by {worst:.2g} on the probe"
    return ""
