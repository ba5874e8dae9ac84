"""The rows an engine scores, and what it returns for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One row of a batch: a source, the target to score behind it, and its prompt.

    Rows with the same ``Prompt`` object share it: an engine computes it once where it can.

    Attributes:
        source: Token ids of the input; for seq2seq what the encoder reads.
        target: Token ids of the answer, EOS included; never empty.
        prompt: The row's prompt, None for none; gradients flow into its tensors.
        at: Source tokens before the prompt's input part; 0 puts it in front, ``len(source)`` behind.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    prompt: Prompt | None = None
    at: int = 0

    @property
    def prefix_tokens(self) -> int:
        """Virtual tokens that stand as keys and values before the row's tokens."""
        return 0 if self.prompt is None else self.prompt.prefix_tokens

    @property
    def input_tokens(self) -> int:
        """Virtual tokens in the row's input."""
        return 0 if self.prompt is None else self.prompt.input_tokens

    def source_with(self, virtual: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of the input with the prompt's virtual ids at their position."""
        return (*self.source[: self.at], *virtual, *self.source[self.at :])


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
