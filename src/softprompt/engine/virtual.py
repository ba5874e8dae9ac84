"""To transformers a prompt is vocabulary: its rows get ids from V on.

``VirtualVocabulary`` hooks the input embedding. While rows are lent to it, ids below V are
looked up in the frozen table and the others in the rows; otherwise it does nothing, so the
base model behaves, bit for bit, as if nobody had touched it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from softprompt.backbone.facts import decoder_embedding, input_embedding, side_embeddings


class VirtualVocabulary:
    """Rows behind the vocabulary of one embedding module.

    A plain object, not closures, so that a model that carries it can be copied and pickled.
    """

    def __init__(self, embedding: nn.Embedding, beside: Sequence[nn.Embedding] = ()) -> None:
        """Hook an embedding.

        Args:
            embedding: The input embedding.
            beside: Further tables that are given the same ids (per-layer embeddings of Gemma); a
                virtual id means their padding, as an image token does there.
        """
        self.size = int(embedding.weight.shape[0])
        self.rows: Tensor | None = None  # [N, H], row n has id V + n
        self._virtual: Tensor | None = None
        self._handles: tuple[RemovableHandle, ...] = (
            embedding.register_forward_pre_hook(self.before),
            embedding.register_forward_hook(self.after),
            *(table.register_forward_pre_hook(self.beside) for table in beside),
        )

    @contextmanager
    def lend(self, rows: Tensor | None) -> Iterator[None]:
        """Let ids V, V + 1, … mean ``rows`` ``[N, H]`` inside the context."""
        previous, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows, self._virtual = previous, None

    def remove(self) -> None:
        """Take the hooks off the embedding."""
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: replace virtual ids by a real one and remember where they stood."""
        if self.rows is None:
            return None
        ids = args[0]
        self._virtual = ids - self.size
        return (torch.where(ids < self.size, ids, 0), *args[1:])

    def beside(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of further tables: give them their padding in the place of virtual ids."""
        if self.rows is None:
            return None
        padding = getattr(module, "padding_idx", None) or 0
        return (torch.where(args[0] < self.size, args[0], padding), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: put the rows where the virtual ids stood.

        A scale inside the embedding module (Gemma) is bypassed, as in PEFT.
        """
        if self.rows is None or self._virtual is None:
            return None
        index, self._virtual = self._virtual, None
        picked = self.rows.to(output.device, output.dtype)[index.clamp(min=0)]
        return torch.where((index >= 0).unsqueeze(-1), picked, output)


def vocabulary_of(model: PreTrainedModel) -> VirtualVocabulary:
    """Hook every table of a model that its input ids are looked up in."""
    return VirtualVocabulary(input_embedding(model), side_embeddings(model))


@contextmanager
def virtual_rows(
    model: PreTrainedModel, rows: Tensor | None, *, decoder: bool = False
) -> Iterator[None]:
    """Let ids from V on mean ``rows`` ``[N, H]`` in the model inside the context, and leave no hook.

    Args:
        model: The model.
        rows: The rows.
        decoder: Whether they stand among the ids of a seq2seq model's decoder instead of its input.
    """
    vocabulary = VirtualVocabulary(decoder_embedding(model)) if decoder else vocabulary_of(model)
    try:
        with vocabulary.lend(rows):
            yield
    finally:
        vocabulary.remove()
