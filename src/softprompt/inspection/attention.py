"""Attention mass: how much of the text's attention goes to the virtual tokens, layer by layer.

The weights are the model's own, of its eager attention, in the passes of our plain path, one row at a time.
A first virtual token may draw much of it as an attention sink whatever it holds (Xiao et al. 2024), which says
nothing of what was learned: hence the mass on each virtual token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from softprompt.engine import EngineRow, PlainEngine
from softprompt.errors import BackboneError
from softprompt.progress import progress_bar

if TYPE_CHECKING:
    from softprompt.backbone import Base

_BAR_SECONDS = 2.0
"""Seconds after which a progress bar appears."""


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


class _Row(NamedTuple):
    """Attention of one row to each virtual token, summed over its text tokens, and over those that answer."""

    text: Tensor  # [L, A, P]
    answering: Tensor  # [L, A, P]
    tokens: int
    answers: int
    uniform: float


def _mean(rows: Sequence[_Row]) -> AttentionMass:
    tokens, answers = sum(row.tokens for row in rows), sum(row.answers for row in rows)
    found = torch.stack([row.text for row in rows]).sum(0) / tokens  # [L, A, P]
    heads = found.sum(2)
    answering = torch.stack([row.answering for row in rows]).sum((0, 3)).mean(1) / max(answers, 1)
    layers = [
        LayerMass(
            share=float(own.mean()),
            head_min=float(own.min()),
            head_max=float(own.max()),
            answering=float(answering[index]) if answers else None,
            by_token=tuple(round(value, 6) for value in found[index].mean(0).tolist()),
        )
        for index, own in enumerate(heads)
    ]
    return AttentionMass(len(rows), tokens, sum(row.uniform for row in rows) / tokens, tuple(layers))


@torch.no_grad()
def attention_mass(base: Base, rows: Sequence[EngineRow]) -> dict[str, AttentionMass]:
    """Return the attention mass on the prompt of some rows, which all have the same one.

    ``self`` is the attention of a causal model, or of a decoder to what stands in the decoder; ``encoder`` that of
    an encoder; ``cross`` that of a decoder to the virtual tokens in the encoder.

    Args:
        base: The base.
        rows: The rows, each with its prompt and a target.

    Raises:
        BackboneError: The model does not tell its attention weights.
        SoftPromptError: A row does not fit the model.
    """
    engine, found = PlainEngine(base, trusted=True), dict[str, list[_Row]]()
    with progress_bar(len(rows), "row", delay=_BAR_SECONDS) as bar:
        for row in rows:
            with base.running(attention="eager"), _watched(base) as seen:
                try:
                    engine.target_log_probs([row])
                except (AttributeError, RuntimeError, TypeError, ValueError) as cause:  # a model's own code
                    raise BackboneError(f"{base.facts.architecture} does not tell its weights: {cause}") from cause
            for place, weights in _weights(seen, row).items():
                found.setdefault(place, []).append(_row(place, weights, row, base.is_encoder_decoder))
            bar.update()
    if not found:
        raise BackboneError(f"{base.facts.architecture} does not tell its attention weights")
    return {place: _mean(each) for place, each in found.items()}


def _row(place: str, weights: Tensor, row: EngineRow, seq2seq: bool) -> _Row:
    """Return what one row's weights ``[L, A, Q, K]`` in one place give to the virtual tokens."""
    queries, keys, answer, prompt = weights.shape[2], weights.shape[3], len(row.target), row.prompt
    assert prompt is not None, "attention to a prompt needs one"
    in_decoder = place == "self" and seq2seq
    start, inside = (0, prompt.decoder_tokens) if in_decoder else (row.at, prompt.input_tokens)
    columns = slice(start, start + inside + prompt.prefix_tokens)
    seen = torch.full((queries,), keys)  # tokens that each query sees; 0 for those that do not count
    if place == "self":
        seen = torch.arange(1, queries + 1) + keys - queries  # keys in front of the queries are a prefix
        seen[: start + inside if inside else 0] = 0  # virtual tokens, and text before them
        seen[-1] *= seq2seq  # nothing is predicted from the last token of a causal model
    elif place == "encoder":
        seen[columns] = 0
    answering = torch.zeros(queries, dtype=torch.bool)
    if place != "encoder":
        answering[slice(-answer, None) if seq2seq else slice(-answer - 1, -1)] = True
        answering &= seen > 0  # behind the text a virtual token may predict the first one
    mass = weights[..., columns].double().cpu()  # [L, A, Q, P]
    return _Row(
        text=mass[:, :, seen > 0].sum(2),
        answering=mass[:, :, answering].sum(2),
        tokens=int((seen > 0).sum()),
        answers=int(answering.sum()),
        uniform=float((mass.shape[3] / seen[seen > 0]).sum()),
    )


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
    with ExitStack() as stack:
        for each in modules:
            stack.enter_context(each.register_forward_pre_hook(wish, with_kwargs=True))
            stack.enter_context(each.register_forward_hook(lambda module, args, output: seen.append(output)))
        yield seen
