"""The loss of a training step on a causal model, by the engine that ``tune`` trains with.

What a call returns in training is read for its loss alone: by transformers' Trainer, and in a loop of one's own. So
the loss comes from the engine, and the logits, which cover P + T columns, from the padded pass where somebody reads
them. Whatever the engine would not give exactly as the padded pass does is left to that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt.backbone import Base
from softprompt.engine import (
    IGNORED,
    Drawn,
    EngineRow,
    PlainEngine,
    build_engine,
    check_token_ids,
    difference,
    measured,
    remembered,
    require_gradient,
    score_of,
)
from softprompt.errors import ConfigError, TrainingError
from softprompt.prompts import Prompt

_TAKEN = {"input_ids", "attention_mask", "labels", "num_items_in_batch"}
_IDLE = {"use_cache": (None, False), "return_dict": (None, True)}
"""Further arguments with the values that ask for nothing."""

_SCORED = 256
"""Entries of each output vector, logits of a vocabulary among them, that a gradient is checked with."""

_ASKS_FOR_MORE = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Options of a model's configuration that put more into its outputs or its loss."""


@final
class LossOutput(CausalLMOutputWithPast):
    """A loss, and logits ``[B, P + T, V]`` that are made when they are first read.

    Iterating (``keys``, ``items``) shows what has been made, as it shows of any output what is not None.
    """

    _make: Callable[[], Tensor] | None = None
    _made: Tensor | None = None

    @classmethod
    def of(cls, loss: Tensor, make: Callable[[], Tensor]) -> LossOutput:
        """Return the outputs of a pass whose logits ``make`` makes."""
        output = cls(loss=loss)
        output._make = make
        return output

    @property
    def logits(self) -> Tensor | None:
        """Logits of all columns, made by a pass of their own."""
        if self._make is not None:
            make, self._make = self._make, None
            self.logits = make()
        return self._made

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        self._made = value

    def __getitem__(self, key: Any) -> Any:
        """Look up by name, or by number as in ``to_tuple``."""
        if key in ("loss", 0):
            return self.loss
        return self.logits if key == "logits" else super().__getitem__(key)  # type: ignore[no-untyped-call]

    def get(self, key: Any, default: Any = None) -> Any:
        """Look up by name."""
        return self[key] if key in ("loss", "logits") else super().get(key, default)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return loss and logits."""
        return self.loss, self.logits


def trains(prompts: Sequence[Prompt | None]) -> bool:
    """Tell whether a call takes gradients of its rows' prompts."""
    return torch.is_grad_enabled() and any(_trained(prompt) for prompt in dict.fromkeys(prompts))


def _trained(prompt: Prompt | None) -> bool:
    return prompt is not None and any(tensor.requires_grad for tensor in prompt.tensors)


def check_gradient(
    base: Base,
    prompts: Sequence[Prompt | None],
    at: Sequence[int] | None,
    inputs: dict[str, Any],
    run: Callable[[dict[str, Any], Sequence[Prompt | None]], Any],
    *,
    causal: bool,
) -> None:
    """Check at the first training call of a base that it passes on the gradient of a prompt.

    A causal model is checked on the shortest row that is trained on, any other on the whole batch.

    Args:
        base: The base.
        prompts: The prompt of each row, ``[B]``.
        at: Real tokens of each row before its prompt; None puts all in front.
        inputs: The arguments of the call.
        run: The padded pass.
        causal: Whether the rows are those of a causal model without heads.

    Raises:
        TrainingError: It does not.
    """
    prompt = next(each for each in prompts if _trained(each))
    assert prompt is not None, "no prompt is trained"
    name = f"gradient of {'keys and values' if prompt.prefix is not None else 'virtual tokens'}"
    if name in base.found or torch.compiler.is_compiling():
        return
    given = {n for n, value in inputs.items() if value is not None}
    scored = causal and base.facts.takes_cache and {"input_ids", "labels"} <= given
    rows = [row for row, _ in (_rows(prompts, at, inputs) if scored else None) or () if row.prompt is prompt]
    if rows:
        row = min(rows, key=lambda each: len(each.source) + len(each.target))
        require_gradient(base, prompt.detach(), score_of(PlainEngine(base, trusted=True), row))
    else:
        outputs = _Outputs(lambda moved: run(inputs, [moved if each is prompt else each for each in prompts]))
        try:
            require_gradient(base, prompt.detach(), outputs)
        except TrainingError:
            if not outputs.blank:
                raise
            return
    base.found[name] = ""


class _Outputs:
    """Outputs of a pass as scores: as a whole of the size of log-probabilities, each weighted otherwise.

    Attributes:
        blank: Whether they were zero behind the first prompt, as those of a head that starts at zero.
    """

    def __init__(self, run: Callable[[Prompt], Any]) -> None:
        self._run = run
        self._norm: Tensor | None = None
        self.blank = False

    def __call__(self, prompt: Prompt) -> Tensor:
        output = self._run(prompt)
        parts = output if isinstance(output, tuple) else tuple(output.values())
        found = next(p for p in parts if isinstance(p, Tensor) and p.is_floating_point() and p.dim())
        values = found[..., :_SCORED].double().flatten()
        if self._norm is None:
            self._norm, self.blank = values.detach().norm(), not bool(values.any())
        weights = torch.arange(1, len(values) + 1, device=values.device).sin()
        return values * weights / self._norm


def training_output(
    base: Base,
    prompts: Sequence[Prompt | None],
    at: Sequence[int] | None,
    inputs: dict[str, Any],
    run: Callable[[dict[str, Any]], Any],
) -> LossOutput | None:
    """Return the outputs of a training step, None where they are left to the padded pass.

    Args:
        base: A causal model.
        prompts: The prompt of each row, ``[B]``.
        at: Real tokens of each row before its prompt; None puts all in front.
        inputs: The arguments of the call.
        run: The padded pass.
    """
    loss = _engine_loss(base, prompts, at, inputs)
    if loss is None:
        return None
    tensors = [tensor for prompt in dict.fromkeys(prompts) if prompt is not None for tensor in prompt.tensors]
    read = {name: inputs[name] for name in ("input_ids", "attention_mask") if inputs.get(name) is not None}
    before = [(tensor, tensor._version) for tensor in (*tensors, *read.values())]

    def logits() -> Tensor:
        if any(tensor._version != version for tensor, version in before):
            raise ConfigError(
                "the prompt or the batch has changed since this forward call, whose logits are made when they are "
                "read; read outputs.logits before optimizer.step(), or call the model again"
            )
        made: Tensor = run(read).logits
        return made

    return LossOutput.of(loss, logits)


def _engine_loss(
    base: Base, prompts: Sequence[Prompt | None], at: Sequence[int] | None, inputs: dict[str, Any]
) -> Tensor | None:
    """Return the loss that the padded pass would compute, None where it is left to that pass."""
    given = {name: value for name, value in inputs.items() if value is not None}
    asks = {name for name in given if name not in _TAKEN and given[name] not in _IDLE.get(name, ())}
    config = base.model.config
    plain = (
        asks
        or not {"input_ids", "labels"} <= given.keys()
        or torch.is_autocast_enabled(base.device.type)
        or torch.compiler.is_compiling()
        or any(getattr(config, name, False) for name in _ASKS_FOR_MORE)
        or not getattr(config, "return_dict", True)
    )
    if not plain:
        check_token_ids(given["input_ids"], base.facts.vocabulary)
    rows = None if plain else _rows(prompts, at, given)
    if rows is None or remembered(base, "loss of labels", lambda: _difference(base)):
        return None
    engine = build_engine(base)
    if engine.name == "plain":
        return None
    scored = engine.target_log_probs([row for row, _ in rows])
    counts = torch.tensor([keeps for _, row_keeps in rows for keeps in row_keeps], device=scored.values.device)
    loss = -(scored.values * counts).sum()
    divisor = given.get("num_items_in_batch")
    return loss / (counts.sum() if divisor is None else torch.as_tensor(divisor, device=loss.device))


def _rows(
    prompts: Sequence[Prompt | None], at: Sequence[int] | None, inputs: dict[str, Any]
) -> list[tuple[EngineRow, list[bool]]] | None:
    """Return the rows that have labels, and which of their target tokens count; None where labels are no target.

    A target goes from a row's first label to its last; tokens behind it change nothing. The first token of a row
    is predicted by a prompt in front of it, or by nothing.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    ids, labels, mask = ids.cpu(), labels.cpu(), mask.cpu()
    if ids.dim() != 2 or labels.shape != ids.shape or mask.shape != ids.shape:
        return None
    real, labelled = mask.bool(), labels != IGNORED
    if bool((labelled & (~real | (labels != ids))).any()):
        return None
    rows = []
    for index, (prompt, keep) in enumerate(zip(prompts, real, strict=True)):
        tokens, wanted = ids[index][keep].tolist(), labelled[index][keep].tolist()
        before = 0 if at is None else at[index]
        in_front = prompt is not None and prompt.input_tokens > 0 and before == 0
        if wanted and wanted[0] and not in_front:
            if not bool(keep[0]):
                return None  # a model without a prompt there predicts the first token from its padding
            wanted[0] = False
        if True not in wanted:
            continue
        first, last = wanted.index(True), len(wanted) - wanted[::-1].index(True)
        if first < before:
            return None
        rows.append(
            (EngineRow(tuple(tokens[:first]), tuple(tokens[first:last]), prompt, before), wanted[first:last])
        )
    return rows or None


def _difference(base: Base) -> str:
    """Return how a model's own loss of labels is otherwise than the mean of its targets; empty if it is not."""
    drawn = Drawn(base)
    tokens = [drawn.tokens(6) for _ in range(8)]

    def own() -> Tensor:
        return torch.stack([base.model(input_ids=row, labels=row).loss for row in ids[:, None]])

    ids = torch.tensor(tokens, device=base.device)
    with torch.no_grad(), base.lock:
        expected, moved = measured(base, own)
        scored = build_engine(base).target_log_probs([EngineRow(row[:1], row[1:]) for row in tokens])
    return difference("losses", -scored.row_sums(len(tokens)) / 5, expected, moved)
