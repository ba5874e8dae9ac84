"""Attention mass: how much of the text's attention goes to the virtual tokens, layer by layer.

The weights are the model's own, of its eager attention, in the passes of our plain path, one row at a time.
A first virtual token may draw much of it as an attention sink whatever it holds (Xiao et al. 2024), which says
nothing of what was learned: hence the mass on each virtual token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from softprompt.backbone import Base
from softprompt.engine import EngineRow, PlainEngine
from softprompt.errors import BackboneError


@dataclass(frozen=True, slots=True)
class LayerMass:
    """One layer's attention to the virtual tokens, as shares of all attention, 0 to 1.

    Attributes:
        share: Mean over the heads and the text tokens that can see them, of all rows.
        head_min: The same of the head with the least.
        head_max: The same of the head with the most.
        answering: ``share`` of those text tokens alone from which the answer is predicted; None where none is,
            as in an encoder.
        by_token: ``share`` of each virtual token ``[P]``, to six decimals.
    """

    share: float
    head_min: float
    head_max: float
    answering: float | None
    by_token: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AttentionMass:
    """Attention to virtual tokens in one place of the model.

    Attributes:
        rows: Rows that were run.
        text_tokens: Text tokens whose attention is counted.
        uniform: The share they would have if every token that a text token sees had the same, mean.
        layers: In order; of a model with layers of other kinds, those with attention.
    """

    rows: int
    text_tokens: int
    uniform: float
    layers: tuple[LayerMass, ...]


@dataclass(slots=True)
class _Sum:
    """Sums over the rows: the shares of each layer, head and virtual token ``[L, A, P]``, and their counts."""

    rows: int = 0
    tokens: int = 0
    answering: int = 0
    uniform: float = 0.0
    all: Tensor | float = 0.0
    answers: Tensor | float = 0.0

    def add(self, weights: Tensor, columns: slice, seen: Tensor, answering: slice | None) -> None:
        """Add a row's weights ``[L, A, Q, K]``: what tokens in the order of the batch see of virtual ``columns``.

        ``seen`` ``[Q]`` counts what each query sees, 0 for those that do not count.
        """
        mass = weights[..., columns].double().cpu()  # [L, A, Q, P]
        counts = seen > 0
        self.rows, self.tokens = self.rows + 1, self.tokens + int(counts.sum())
        self.all = self.all + mass[:, :, counts].sum(2)
        self.uniform += float((mass.shape[-1] / seen[counts]).sum())
        if answering is not None:
            part = mass[:, :, answering]
            self.answers, self.answering = self.answers + part.sum(2), self.answering + part.shape[2]

    def mass(self) -> AttentionMass:
        """Return the means."""
        found = cast(Tensor, self.all) / self.tokens  # [L, A, P]
        heads = found.sum(2)
        answers = cast(Tensor, self.answers / self.answering).sum(2).mean(1).tolist() if self.answering else None
        layers = [
            LayerMass(
                share=float(own.mean()),
                head_min=float(own.min()),
                head_max=float(own.max()),
                answering=None if answers is None else answers[index],
                by_token=tuple(round(value, 6) for value in found[index].mean(0).tolist()),
            )
            for index, own in enumerate(heads)
        ]
        return AttentionMass(self.rows, self.tokens, self.uniform / self.tokens, tuple(layers))


@torch.no_grad()
def attention_mass(
    base: Base, rows: Sequence[EngineRow], done: Callable[[], Any] = lambda: None
) -> dict[str, AttentionMass]:
    """Return the attention mass on the prompt of some rows, which all have the same one.

    ``self`` is the attention of a causal model, or of a decoder to what stands in the decoder; ``encoder`` that of
    an encoder; ``cross`` that of a decoder to the virtual tokens in the encoder.

    Args:
        base: The base.
        rows: The rows, each with its prompt and a target.
        done: Called after each row.

    Raises:
        BackboneError: The model does not tell its attention weights.
        SoftPromptError: A row does not fit the model.
    """
    engine, sums = PlainEngine(base, trusted=True), dict[str, _Sum]()
    for row in rows:
        with base.running(attention="eager"), _watched(base) as seen:
            try:
                engine.target_log_probs([row])
            except (AttributeError, RuntimeError, TypeError, ValueError) as cause:  # a model's own code
                raise BackboneError(
                    f"{base.facts.architecture} does not run with its weights told: {cause}"
                ) from cause
        for name, weights in _weights(seen, row).items():
            _add(sums.setdefault(name, _Sum()), name, weights, row, base.is_encoder_decoder)
        done()
    if not sums:
        raise BackboneError(f"{base.facts.architecture} does not tell its attention weights")
    return {name: each.mass() for name, each in sums.items()}


def _add(sums: _Sum, name: str, weights: Tensor, row: EngineRow, seq2seq: bool) -> None:
    """Add one row's weights ``[L, A, Q, K]`` of one place."""
    queries, keys, answer = weights.shape[2], weights.shape[3], len(row.target)
    prompt = row.prompt
    assert prompt is not None, "attention to a prompt needs one"
    if name == "self" and seq2seq:
        start, count, first = 0, prompt.decoder_tokens + prompt.prefix_tokens, prompt.decoder_tokens
    else:
        start, count = row.at, prompt.input_tokens + prompt.prefix_tokens
        first = 0 if prompt.prefix is not None else row.at + count
    if name == "self":
        seen = torch.arange(1, queries + 1) + keys - queries  # keys in front of the queries are a prefix
        seen[:first] = 0  # the virtual tokens, and text before them
        seen[-1] = seen[-1] if seq2seq else 0  # nothing is predicted from the last token
        answering = slice(-answer, None) if seq2seq else slice(-answer - 1, -1)
    else:
        seen = torch.full((queries,), keys)
        if name == "encoder":
            seen[start : start + count] = 0
        answering = None if name == "encoder" else slice(-answer, None)
    sums.add(weights, slice(start, start + count), seen, answering)


def _weights(seen: Sequence[Any], row: EngineRow) -> dict[str, Tensor]:
    """Return the weights of one row that are about its prompt, by place, ``[L, A, Q, K]``."""
    prompt, found = row.prompt, dict[str, Tensor]()
    assert prompt is not None, "attention to a prompt needs one"
    inside, before = prompt.input_tokens > 0, prompt.decoder_tokens + prompt.prefix_tokens > 0
    for output in seen:
        seq2seq = hasattr(output, "decoder_attentions")
        names = {
            "self": "decoder_attentions" if seq2seq and before else "" if seq2seq else "attentions",
            "cross": "cross_attentions" if seq2seq and inside else "",
        }
        if not seq2seq and not hasattr(output, "logits"):  # an encoder's own output
            names = {"encoder": "attentions"} if inside else {}
        for name, attribute in names.items():
            layers = [each for each in (getattr(output, attribute, None) or ()) if each is not None]
            if layers:
                found[name] = torch.stack([each[0].float() for each in layers])
    return found


@contextmanager
def _watched(base: Base) -> Iterator[list[Any]]:
    """Let the model, and its encoder if it has one, return attention weights inside the context, and yield them."""
    seen: list[Any] = []

    def wish(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"output_attentions": True}

    model = cast(Any, base.model)
    modules = [model, model.get_encoder()] if base.is_encoder_decoder else [model]
    handles = [each.register_forward_pre_hook(wish, with_kwargs=True) for each in modules]
    handles += [each.register_forward_hook(lambda module, args, output: seen.append(output)) for each in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
