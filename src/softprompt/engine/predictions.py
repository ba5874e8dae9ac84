"""What a pass predicts for the target tokens, and the states it predicts it from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from softprompt.engine.forest.plan import Targets
from softprompt.engine.rows import EngineRow, TargetLogProbs, TargetOutputs
from softprompt.errors import BackboneError

IGNORED = -100
"""Label of a column that nothing is predicted for."""


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
        hidden: What entered the LM head there, ``[K, H]``; None where nobody asked.
        place: The predicting token of each target token, ``[M]``.
        labels: The target tokens, ``[M]``.
        row_index: The row each belongs to, ``[M]``.
    """

    logits: Tensor
    hidden: Tensor | None
    place: Tensor
    labels: Tensor
    row_index: Tensor

    @classmethod
    def of_columns(cls, logits: Tensor, hidden: Tensor | None, labels: Tensor) -> Predictions:
        """Take those of a padded batch: logits ``[B, T, V]``, states ``[B, T, H]``, labels ``[B, T]``."""
        real = labels != IGNORED
        chosen = labels[real]
        place = torch.arange(len(chosen), device=labels.device)
        states = None if hidden is None else hidden[real]
        return cls(logits[real], states, place, chosen, real.nonzero()[:, 0])

    @classmethod
    def of_stream(
        cls, logits: Tensor, hidden: Tensor | None, place: Tensor, targets: Targets
    ) -> Predictions:
        """Take those of a packed stream: logits ``[1, K, V]``, states ``[1, K, H]``, places ``[M]``."""
        states = None if hidden is None else hidden[0]
        rest = (place, targets.labels, targets.row_index)
        return cls(logits[0], states, *(each.to(logits.device) for each in rest))

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return those of rows that were run one by one as those of their batch."""
        states = [part.hidden for part in parts if part.hidden is not None]
        sizes = [len(part.logits) for part in parts]
        return cls(
            torch.cat([part.logits for part in parts]),
            torch.cat(states) if states else None,
            torch.cat([part.place + sum(sizes[:i]) for i, part in enumerate(parts)]),
            torch.cat([part.labels for part in parts]),
            torch.cat([torch.full_like(part.row_index, row) for row, part in enumerate(parts)]),
        )

    def log_probs(self) -> TargetLogProbs:
        """Return the log-probability of each target token."""
        if len(self.place) == len(self.logits):  # one target each
            values = -F.cross_entropy(
                self.logits.float()[self.place], self.labels, reduction="none"
            )
        else:  # one softmax a predictor, shared by its answers
            values = F.log_softmax(self.logits.float(), dim=-1)[self.place, self.labels]
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
        logits, hidden = self.logits.float()[self.place], self.hidden[self.place]
        return TargetOutputs(logits, hidden, self.labels, self.row_index)


class PredictingEngine(ABC):
    """An engine whose answers all come from one kind of pass."""

    _model: PreTrainedModel

    @abstractmethod
    def predict(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor], head: HeadInput | None = None
    ) -> Predictions:
        """Run the rows; ``head`` sees what enters the LM head, where that is wanted."""

    def target_log_probs(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor]
    ) -> TargetLogProbs:
        """Score the targets of rows; see ``Engine``.

        Raises:
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        return self.predict(rows, prompts).log_probs()

    def target_outputs(self, rows: Sequence[EngineRow], prompts: Sequence[Tensor]) -> TargetOutputs:
        """Return what predicts the targets of rows; see ``Engine``.

        Raises:
            BackboneError: If the model has no LM head that is a module.
            DataError: If nothing stands before a row's answer.
            ContextOverflowError: If a row does not fit behind its prompt.
        """
        with _head_input(self._model) as head:
            return self.predict(rows, prompts, head).outputs()


@contextmanager
def _head_input(model: PreTrainedModel) -> Iterator[HeadInput]:
    module = cast(Any, model).get_output_embeddings()
    if module is None:
        raise BackboneError(
            f"{type(model).__name__} has no output embeddings; load it as a language model"
        )
    head = HeadInput()
    handle = module.register_forward_pre_hook(head.hook, with_kwargs=True)
    try:
        yield head
    finally:
        handle.remove()
