"""Encoders without padding, inside the model's own forward; and prompts that do not see the input.

The layers between embeddings and head run on real tokens; positions, pooling and heads see the
shapes they expect. A model is packed after a probe: hidden states packed must equal those padded.
Prompts that do not see the input are computed once for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt.backbone import (
    Base,
    cache_in,
    has_windows,
    most_by_rounding,
    off_by,
    recomputes_layers,
    skips_layers,
)
from softprompt.engine import Drawn, Layout, difference, measured, one_line, pad_rows, remembered
from softprompt.engine.forest.forest_attention import NAME, LayerMask, planned
from softprompt.engine.forest.layers import Packing, layers_of, packed_layers, relative_bias
from softprompt.engine.forest.plan import Span, Visibility, padded, whole_rows

_LENGTHS = (9, 4, 6)
"""Tokens of each row of the probe."""


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
    if "__call__" in vars(GradientCheckpointingLayer):  # before transformers 5.23 their hooks are run again, too
        return False
    layers = layers_of(base.model.base_model, windows=True)
    return all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def why_not_packed(base: Base) -> str:
    """Return why the model's layers are run padded, empty when they are packed."""
    return remembered(base, "packed encoder", lambda: _packed_difference(base))


@contextmanager
def without_padding(base: Base, mask: Tensor, isolated: Layout | None = None) -> Iterator[None]:
    """Run the layers of an encoder on real tokens inside the context, where ``packs`` allows it.

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
        plan = replace(whole_rows(mask.sum(1).tolist()), query_positions=columns, key_positions=columns)
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
            prompts[first] = Span.seeing_all(prompt, prompt)
        texts.append(Span.seeing_all(text, torch.cat([prompt, text])))
    positions = layout.positions().flatten()[packing.take].cpu()
    return padded([list(prompts.values()), texts], positions, positions)


@torch.no_grad()
def _packed_difference(base: Base) -> str:
    model, facts = base.model, base.facts
    if facts.is_encoder_decoder or model.can_generate():
        return "it is no encoder"
    drawn = Drawn(base)
    ids, mask = pad_rows([drawn.tokens(n) for n in _LENGTHS], left=False, pad_id=facts.pad_id)
    ids, mask = ids.to(base.device), mask.to(base.device)
    caches = []

    def states() -> Tensor:
        output = model.base_model(input_ids=ids, attention_mask=mask)
        caches.append(cache_in(output))
        return cast(Tensor, output.last_hidden_state)[mask.bool()]

    expected, moved = measured(base, states)
    if any(cache is not None for cache in caches):
        return "it fills a cache"
    with without_padding(base, mask):
        return difference("hidden states", states(), expected, moved)


def _alike(base: Base, run: Callable[[], Tensor]) -> bool:
    """Tell whether the two rows of what a run returns are the same but for rounding."""
    states, moved = measured(base, run)
    return off_by(states[0], states[1]) <= most_by_rounding(states, moved)


def why_not_isolated(base: Base) -> str:
    """Return why no prompt of this encoder can be kept from seeing the input, empty where it can."""
    return remembered(base, "prompts that do not see the input", lambda: _isolation_problem(base))


@torch.no_grad()
def _isolation_problem(base: Base) -> str:
    """Two columns that may see each other alone must not notice what stands behind them."""
    model = base.model
    encoder: Any = model.get_encoder() if base.is_encoder_decoder else model.base_model
    if has_windows(encoder):
        return "some of its layers see only a window, which a mask of our own would replace"
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]], device=base.device) % base.facts.vocabulary
    mask = torch.zeros(2, 1, 4, 4, dtype=base.dtype, device=base.device)
    mask[:, :, :2, 2:] = torch.finfo(base.dtype).min
    try:
        same = _alike(base, lambda: encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, :2])
    except Exception as cause:  # whatever a model's own code raises on such a mask
        return f"it takes no mask of our own ({one_line(cause)})"
    return "" if same else "it ignores a mask of our own"
