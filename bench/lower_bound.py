"""The least FLOPs of a training step: what an exact method cannot do without.

Two passes of the weights of the layers (forward, and the gradient of their inputs) over the
tokens that must be computed, the head over the answers alone, attention between the pairs that
see each other (backward counts two and a half times). Embedding look-ups are free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_PASSES = 2 * 2
"""FLOPs of a weight and a token: a product and a sum, in both passes."""

_ATTENTION = 4 * 3.5
"""FLOPs of a pair and a unit of width: two products forward, five for two backward."""


def lower_bound(
    build: Callable[[], Any],
    task: str,
    virtual: int,
    lengths: Sequence[int],
    answer: int,
    *,
    sees_input: bool = True,
) -> int:
    """Return the least FLOPs of a step.

    Args:
        build: Makes the model.
        task: PEFT's task type.
        virtual: Virtual tokens (P), the same for all rows.
        lengths: Tokens of each row; in causal models the answer is among them.
        answer: Answer tokens of a row.
        sees_input: Whether an encoder's prompt sees the input.
    """
    with torch.device("meta"):
        model = build()
    if task == "CAUSAL_LM":
        return _causal(model, virtual, lengths, answer)
    if task == "SEQ_CLS":
        return _classifier(model, virtual, lengths)
    return _seq2seq(model, virtual, lengths, answer, sees_input=sees_input)


def _causal(model: Any, virtual: int, lengths: Sequence[int], answer: int) -> int:
    embedding = model.get_input_embeddings().weight.numel()
    positions = sum(p.numel() for n, p in model.named_parameters() if ".wpe." in n)
    weights = sum(p.numel() for p in model.parameters()) - embedding - positions
    real = [length - 1 for length in lengths]  # the last token of an answer predicts nothing
    pairs = virtual * (virtual + 1) / 2
    pairs += sum(t * virtual + t * (t + 1) / 2 for t in real)
    attention = model.config.num_hidden_layers * pairs * model.config.hidden_size
    products = weights * (virtual + sum(real)) + embedding * answer * len(real)
    return int(_PASSES * products + _ATTENTION * attention)


def _encoded(virtual: int, lengths: Sequence[int], *, sees_input: bool) -> tuple[int, int]:
    """Return the tokens of an encoder, and its pairs; an isolated prompt is computed once."""
    if sees_input:
        return sum(virtual + t for t in lengths), sum((virtual + t) ** 2 for t in lengths)
    return virtual + sum(lengths), virtual**2 + sum(t * (virtual + t) for t in lengths)


def _classifier(model: Any, virtual: int, lengths: Sequence[int]) -> int:
    tokens, pairs = _encoded(virtual, lengths, sees_input=True)
    layers = model.base_model.encoder
    head = _linear(model) - _linear(layers)
    attention = model.config.num_hidden_layers * pairs * model.config.hidden_size
    return int(_PASSES * (_linear(layers) * tokens + head * len(lengths)) + _ATTENTION * attention)


def _seq2seq(model: Any, virtual: int, lengths: Sequence[int], answer: int, *, sees_input: bool) -> int:
    config, head = model.config, model.get_output_embeddings().weight.numel()
    tokens, pairs = _encoded(virtual, lengths, sees_input=sees_input)
    states = sum(
        _linear(module)
        for name, module in model.decoder.named_modules()
        if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    )
    answers = answer * len(lengths)
    products = (_linear(model.encoder) + states) * tokens
    products += (_linear(model.decoder) - states + head) * answers
    attention = config.num_layers * pairs
    attention += config.num_decoder_layers * len(lengths) * answer * (answer + 1) / 2
    attention += config.num_decoder_layers * sum(answer * (virtual + t) for t in lengths)
    width = config.num_heads * config.d_kv
    return int(_PASSES * products + _ATTENTION * attention * width)


def _linear(module: nn.Module) -> int:
    """Return the weights of the linear layers in a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
