"""What an engine is asked and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One row to run: a source, the answer to score behind it, and the prompt before both.

    Attributes:
        source: Token ids of the input; for seq2seq what the encoder reads.
        target: Token ids of the answer, EOS included; never empty.
        prompt: Index into the prompts of the call, -1 for none.
        at: Source tokens before the prompt; 0 puts it in front, ``len(source)`` behind the input.
        decoder_prompt: Index of the prompt before the answer of a seq2seq model, -1 for none.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    prompt: int = 0
    at: int = 0
    decoder_prompt: int = -1


def is_keys_and_values(prompt: Tensor) -> bool:
    """Tell a prompt of keys and values ``[L, 2, A_kv, P, D]`` from one of rows ``[P, H]``."""
    return prompt.dim() == 5


def prompt_length(prompts: Sequence[Tensor], index: int) -> int:
    """Return the positions that a prompt of a call takes (P), 0 for none."""
    if index < 0:
        return 0
    return int(prompts[index].shape[3 if is_keys_and_values(prompts[index]) else 0])


def any_prefix(rows: Sequence[EngineRow], prompts: Sequence[Tensor]) -> bool:
    """Tell whether a row has a prompt of keys and values."""
    used = {index for row in rows for index in (row.prompt, row.decoder_prompt) if index >= 0}
    return any(is_keys_and_values(prompts[index]) for index in used)


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


def joined(parts: Sequence[TargetLogProbs]) -> TargetLogProbs:
    """Return the answers for rows that were run one by one, as those of their batch."""
    numbers = [torch.full_like(part.row_index, row) for row, part in enumerate(parts)]
    return TargetLogProbs(torch.cat([part.values for part in parts]), torch.cat(numbers))


class Engine(Protocol):
    """Teacher-forced passes over a frozen model, differentiable in the prompts."""

    name: str

    def target_log_probs(
        self, rows: Sequence[EngineRow], prompts: Sequence[Tensor]
    ) -> TargetLogProbs:
        """Score the targets of rows under their prompts ``[P_i, H]``."""
        ...

    def target_outputs(self, rows: Sequence[EngineRow], prompts: Sequence[Tensor]) -> TargetOutputs:
        """Return logits and last hidden states for the same tokens, in the same order."""
        ...
