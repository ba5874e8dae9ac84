"""What a pass predicts for the target tokens, and the states it predicts it from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor
from torch.nn import functional as F

from softprompt.backbone import Base, Facts, split_of
from softprompt.engine.rows import IGNORED, EngineRow, check_rows
from softprompt.errors import BackboneError

if TYPE_CHECKING:
    from softprompt.engine.forest import Targets
    from softprompt.world import World


@dataclass(frozen=True, slots=True)
class TargetLogProbs:
    """Log-probabilities of every target token of a batch.

    Attributes:
        values: log p of each token, rows in order and tokens in order, float32 ``[M]``.
        row_index: The row each value belongs to, ``[M]``.
    """

    values: Tensor
    row_index: Tensor

    def row_sums(self, count: int) -> Tensor:
        """Return the log-probability of each row's whole target, ``[B]``."""
        zeros = self.values.new_zeros(count)
        return zeros.index_add(0, self.row_index, self.values)


@dataclass(frozen=True, slots=True)
class TargetOutputs:
    """What predicts every target token of a batch, differentiable in the prompts.

    Attributes:
        logits: Logits that predict each token, rows in order and tokens in order, float32 ``[M, V]``.
        hidden: What entered the LM head for them, ``[M, H]``.
        labels: The target tokens, ``[M]``.
        row_index: The row each belongs to, ``[M]``.
    """

    logits: Tensor
    hidden: Tensor
    labels: Tensor
    row_index: Tensor


class HeadInput:
    """What entered the LM head in the latest pass; filled by a hook."""

    def __init__(self) -> None:
        """Start empty."""
        self.states: Tensor | None = None

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the head."""
        self.states = args[0] if args else next(iter(kwargs.values()))


@dataclass(frozen=True, slots=True)
class Predictions:
    """Logits of a pass where they are needed, each perhaps for several targets.

    Attributes:
        logits: Logits of each predicting token, ``[K, V]``.
        hidden: What entered the LM head there, ``[K, H]``; None where it was not wanted.
        predictor: Which of them predicts each target token, ``[M]``.
        labels: The target tokens, ``[M]``.
        row_index: The row each belongs to, ``[M]``.
    """

    logits: Tensor
    hidden: Tensor | None
    predictor: Tensor
    labels: Tensor
    row_index: Tensor

    @classmethod
    def of_columns(cls, logits: Tensor, hidden: Tensor | None, labels: Tensor) -> Predictions:
        """Take those of a padded batch: logits ``[B, T, V]``, states ``[B, T, H]``, labels ``[B, T]``."""
        real = labels != IGNORED
        chosen = labels[real]
        predictor = torch.arange(len(chosen), device=labels.device)
        states = None if hidden is None else hidden[real]
        return cls(logits[real], states, predictor, chosen, real.nonzero()[:, 0])

    @classmethod
    def of_stream(cls, logits: Tensor, hidden: Tensor | None, predictor: Tensor, targets: Targets) -> Predictions:
        """Take those of a packed stream: logits ``[1, K, V]``, states ``[1, K, H]``, predictors ``[M]``."""
        states = None if hidden is None else hidden[0]
        rest = (predictor, targets.labels, targets.row_index)
        return cls(logits[0], states, *(each.to(logits.device) for each in rest))

    @classmethod
    def joined(cls, parts: Sequence[Predictions], rows: Sequence[Sequence[int]]) -> Predictions:
        """Return those of a batch that was run in parts, in the order of its rows.

        Args:
            parts: The predictions of each part.
            rows: The rows of the batch that each part ran, in order.
        """
        states = [part.hidden for part in parts if part.hidden is not None]
        sizes = [len(part.logits) for part in parts]
        predictor = torch.cat([part.predictor + sum(sizes[:i]) for i, part in enumerate(parts)])
        labels = torch.cat([part.labels for part in parts])
        row_index = torch.cat(
            [
                torch.tensor(own, device=part.row_index.device)[part.row_index]
                for part, own in zip(parts, rows, strict=True)
            ]
        )
        order = row_index.argsort(stable=True)
        return cls(
            torch.cat([part.logits for part in parts]),
            torch.cat(states) if states else None,
            predictor[order],
            labels[order],
            row_index[order],
        )

    def log_probs(self) -> TargetLogProbs:
        """Return the log-probability of each target token."""
        if len(self.predictor) == len(self.logits):  # one target each
            values = -F.cross_entropy(self.logits.float()[self.predictor], self.labels, reduction="none")
        else:  # one softmax a predictor, shared by its answers
            values = F.log_softmax(self.logits.float(), dim=-1)[self.predictor, self.labels]
        return TargetLogProbs(values, self.row_index)

    def outputs(self) -> TargetOutputs:
        """Return logits and states of each target token.

        Raises:
            BackboneError: If the pass took no states.
        """
        if self.hidden is None:
            raise BackboneError(
                "the model does not run its output embeddings as a module, so nothing entered them; "
                "distil from logits of another model, or without hidden states"
            )
        logits, hidden = self.logits.float()[self.predictor], self.hidden[self.predictor]
        return TargetOutputs(logits, hidden, self.labels, self.row_index)


class Engine(ABC):
    """Teacher-forced passes over a frozen model, differentiable in the rows' prompts.

    Attributes:
        name: How the rows are run: one of ``ENGINES`` but ``auto``.
    """

    name: str

    def __init__(self, base: Base) -> None:
        """Prepare for a base."""
        self._base = base
        self._facts: Facts = base.facts

    @property
    def base(self) -> Base:
        """What it runs."""
        return self._base

    @property
    def processes(self) -> World:
        """The processes that rows can be shared out to."""
        return split_of(self._base.model)

    @abstractmethod
    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows, of which all prompts see the input or none does."""

    @final
    def predict(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run rows, each behind its prompt.

        Rows whose prompts see the input are run apart from those whose prompts do not.

        Args:
            rows: The rows.
            head: Sees what enters the LM head, where that is wanted.

        Raises:
            ConfigError: If the model cannot have a prompt where a row has it.
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        check_rows(self._base, rows, self._facts)
        parts = _alike(rows)
        if len(parts) == 1:
            return self.run_alike(rows, head)
        found = [self.run_alike([rows[i] for i in part], head) for part in parts]
        return Predictions.joined(found, parts)

    @final
    def target_log_probs(self, rows: Sequence[EngineRow]) -> TargetLogProbs:
        """Return the log-probability of every target token; see ``predict`` for what it raises."""
        return self.predict(rows).log_probs()

    @final
    def target_outputs(self, rows: Sequence[EngineRow]) -> TargetOutputs:
        """Return logits and last hidden states for the same tokens, in the same order; see ``predict``.

        Raises:
            BackboneError: If the model has no LM head that is a module.
        """
        with _head_input(self._base) as head:
            return self.predict(rows, head).outputs()


def see_input(rows: Sequence[EngineRow]) -> bool:
    """Tell whether the prompts of rows that are run together see the input; without any they do."""
    return not any(map(_blind, rows))


def _blind(row: EngineRow) -> bool:
    return row.prompt is not None and row.input_tokens > 0 and not row.prompt.sees_input


def _alike(rows: Sequence[EngineRow]) -> list[list[int]]:
    """Return the rows whose prompts see the input, and the others; rows without any join either."""
    blind = [i for i, row in enumerate(rows) if _blind(row)]
    others = [i for i, row in enumerate(rows) if not _blind(row)]
    if not blind or not any(rows[i].input_tokens for i in others):
        return [list(range(len(rows)))]
    return [others, blind]


@contextmanager
def _head_input(base: Base) -> Iterator[HeadInput]:
    """Yield what enters the LM head inside the context, which holds the base's lock: no pass of others is seen."""
    module = cast(Any, base.model).get_output_embeddings()
    if module is None:
        raise BackboneError(f"{base.facts.architecture} has no output embeddings; load it as a language model")
    head = HeadInput()
    with base.lock, module.register_forward_pre_hook(head.hook, with_kwargs=True):
        yield head
