"""The loss of a training step of a language model, by the engine that ``tune`` trains with.

What a call returns in training is read for its loss alone: by transformers' Trainer, and in a loop of one's own. So
the loss comes from the engine, and all else from the padded pass where somebody reads it. Whatever the engine would
not give exactly as the padded pass does is left to that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

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

_TAKEN = {"input_ids", "attention_mask", "labels", "decoder_input_ids", "num_items_in_batch"}
_IDLE = {"use_cache": (None, False), "return_dict": (None, True)}
"""Further arguments with the values that ask for nothing."""

_SCORED = 256
"""Entries of each output vector, logits of a vocabulary among them, that a gradient is checked with."""

_ASKS_FOR_MORE = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Options of a model's configuration that put more into its outputs or its loss."""

_MAKE = "_softprompt_other_outputs"
"""Attribute of a loss: the function that makes the other outputs."""


class LossOutput:
    """A loss, and all other outputs of the padded pass, which is run when one of them is first read.

    Iterating (``keys``, ``items``) shows what has been made, as it shows of any output what is not None. How to
    make them hangs on the loss, so copies with the same loss (accelerate's under autocast) can make them too.
    """

    loss: Tensor | None

    def __getattribute__(self, name: str) -> Any:
        """Look up an output, made first where it is not there yet."""
        found = super().__getattribute__(name)
        if found is None and name != "loss" and name in cast(Any, type(self)).__dataclass_fields__:
            make = getattr(self.loss, _MAKE, dict)
            for key, value in make().items():
                setattr(self, key, value)
            return super().__getattribute__(name)
        return found

    def __getitem__(self, key: Any) -> Any:
        """Look up by name, or by number as in ``to_tuple``."""
        if key in ("loss", 0):
            return self.loss
        return self._all()[key] if isinstance(key, str) else self.to_tuple()[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Look up by name."""
        return self.loss if key == "loss" else self._all().get(key, default)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return loss, logits and whatever else is not None."""
        return tuple(self._all().values())

    def _all(self) -> dict[str, Any]:
        whole = {name: getattr(self, name) for name in cast(Any, type(self)).__dataclass_fields__}
        return {name: value for name, value in whole.items() if value is not None}


@final
class CausalLossOutput(LossOutput, CausalLMOutputWithPast):
    """Outputs of a training step of a causal model; logits are ``[B, P + T, V]``."""


@final
class Seq2SeqLossOutput(LossOutput, Seq2SeqLMOutput):
    """Outputs of a training step of a seq2seq model; logits are ``[B, T, V]`` of the labels."""


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
        base: A causal or seq2seq model.
        prompts: The prompt of each row, ``[B]``.
        at: Real tokens of each row before its prompt; None puts all in front.
        inputs: The arguments of the call.
        run: The padded pass.
    """
    loss = _engine_loss(base, prompts, at, inputs)
    if loss is None:
        return None
    tensors = [tensor for prompt in dict.fromkeys(prompts) if prompt is not None for tensor in prompt.tensors]
    needed = ("input_ids", "attention_mask", *(("labels",) if base.is_encoder_decoder else ()))
    read = {name: inputs[name] for name in needed if inputs.get(name) is not None}
    before = [(tensor, tensor._version) for tensor in (*tensors, *read.values())]
    device = base.device.type
    half = torch.is_autocast_enabled(device)
    cast_as = torch.autocast(device, torch.get_autocast_dtype(device), enabled=half)

    @cache
    def make() -> dict[str, Any]:
        if any(tensor._version != version for tensor, version in before):
            raise ConfigError(
                "the prompt or the batch has changed since this forward call, whose logits are made when they are "
                "read; read outputs.logits before optimizer.step(), or call the model again"
            )
        with cast_as:
            made = {name: value for name, value in run(read).items() if name != "loss"}
        if half:  # as accelerate returns them
            made = {name: value.float() if isinstance(value, Tensor) else value for name, value in made.items()}
        return made

    setattr(loss, _MAKE, make)
    return (Seq2SeqLossOutput if base.is_encoder_decoder else CausalLossOutput)(loss=loss)


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
        or torch.compiler.is_compiling()
        or any(getattr(config, name, False) for name in _ASKS_FOR_MORE)
        or not getattr(config, "return_dict", True)
    )
    if plain or (given["input_ids"].dim(), given["labels"].dim()) != (2, 2):
        return None
    check_token_ids(given["input_ids"], base.facts.vocabulary)
    rows = _seq2seq_rows(base, prompts, at, given) if base.is_encoder_decoder else _rows(prompts, at, given)
    if rows is None or remembered(base, "loss of labels", lambda: _difference(base)):
        return None
    items = given.get("num_items_in_batch")
    divides = items is not None and not remembered(
        base, "loss over num_items_in_batch", lambda: _difference(base, items=7)
    )
    if (
        items is not None
        and not divides
        and remembered(base, "loss beside num_items_in_batch", lambda: _difference(base, items=7, counted=False))
    ):
        return None
    engine = build_engine(base)
    if engine.name == "plain":
        return None
    scored = engine.target_log_probs([row for row, _ in rows])
    counts = torch.tensor([keeps for _, row_keeps in rows for keeps in row_keeps], device=scored.values.device)
    loss = -(scored.values * counts).sum()
    return loss / (torch.as_tensor(items, device=loss.device) if divides else counts.sum())


_Rows = list[tuple[EngineRow, list[bool]]]


def _rows(prompts: Sequence[Prompt | None], at: Sequence[int] | None, inputs: dict[str, Any]) -> _Rows | None:
    """Return the rows that have labels, and which of their target tokens count; None where labels are no target.

    A target goes from a row's first label to its last; tokens behind it change nothing. The first token of a row
    is predicted by a prompt in front of it, or by nothing.
    """
    ids, labels, real = inputs["input_ids"].cpu(), inputs["labels"].cpu(), _real(inputs)
    if real is None or labels.shape != ids.shape or "decoder_input_ids" in inputs:
        return None
    labelled = labels != IGNORED
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


def _seq2seq_rows(
    base: Base, prompts: Sequence[Prompt | None], at: Sequence[int] | None, inputs: dict[str, Any]
) -> _Rows | None:
    """Return the same of a seq2seq model; None also where its padded pass is as fast."""
    ids, labels, real = inputs["input_ids"].cpu(), inputs["labels"].cpu(), _real(inputs)
    shift = getattr(base.model, "prepare_decoder_input_ids_from_labels", None)
    if real is None or shift is None or any(each is not None and each.prefix_tokens for each in prompts):
        return None
    given = inputs.get("decoder_input_ids")  # of a collator
    if given is not None and not torch.equal(given, shift(labels=inputs["labels"])):
        return None
    rows = []
    for index, (prompt, keep) in enumerate(zip(prompts, real, strict=True)):
        source, wanted = ids[index][keep].tolist(), labels[index] != IGNORED
        count, before = int(wanted.sum()), 0 if at is None else at[index]
        if not source or not bool(wanted[:count].all()):
            return None
        if count:
            target = tuple(labels[index][:count].tolist())
            rows.append((EngineRow(tuple(source), target, prompt, before), [True] * count))
    return rows or None


def _real(inputs: dict[str, Any]) -> Tensor | None:
    """Return where the input is no padding, ``[B, T]``; None for a mask of another shape."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool).cpu()
    return cast(Tensor, mask.bool().cpu()) if mask.shape == ids.shape else None


def _difference(base: Base, *, items: int | None = None, counted: bool = True) -> str:
    """Return how a model's own loss of labels is otherwise than that of its targets; empty if it is not.

    Args:
        base: The base.
        items: The ``num_items_in_batch`` to give; None gives none.
        counted: Whether the loss should be the sum over them, or the mean all the same.
    """
    drawn = Drawn(base)
    tokens = [drawn.tokens(6) for _ in range(8)]
    named = {} if items is None else {"num_items_in_batch": items}
    seq2seq = base.is_encoder_decoder

    def own() -> Tensor:
        return torch.stack([base.model(input_ids=row, labels=row, **named).loss for row in ids[:, None]])

    ids = torch.tensor(tokens, device=base.device)
    rows = [EngineRow(row, row) if seq2seq else EngineRow(row[:1], row[1:]) for row in tokens]
    with torch.no_grad(), base.lock:
        expected, moved = measured(base, own)
        scored = build_engine(base).target_log_probs(rows)
    count = items if items is not None and counted else len(rows[0].target)
    return difference("losses", -scored.row_sums(len(tokens)) / count, expected, moved)
