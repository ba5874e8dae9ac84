"""To transformers a prompt is vocabulary: its rows get ids from V on.

``VirtualVocabulary`` hooks the input embedding. While rows are lent to it, ids below V are
looked up in the frozen table and the others in the rows; otherwise it does nothing, so the
base model behaves, bit for bit, as if nobody had touched it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from softprompt.backbone import (
    decoder_embedding,
    input_embedding,
    is_encoder_decoder,
    side_embeddings,
)
from softprompt.engine.lock import locked
from softprompt.engine.products import frozen_linears, lent_bodies
from softprompt.engine.recomputed import recomputed_alike


class VirtualVocabulary:
    """Rows behind the vocabulary of a model's embedding modules, which all have V ids.

    A plain object, not closures, so that a model that carries it can be copied and pickled.
    """

    def __init__(
        self, embeddings: Sequence[nn.Embedding], beside: Sequence[nn.Embedding] = ()
    ) -> None:
        """Hook embeddings.

        Args:
            embeddings: The input embedding; for seq2seq models the decoder's too.
            beside: Further tables that are given the same ids (per-layer embeddings of Gemma); a
                virtual id means their padding, as an image token does there.
        """
        self.size = int(embeddings[0].weight.shape[0])
        self.rows: Tensor | None = None  # [N, H], row n has id V + n
        self._borrower: int | None = None  # the thread they are lent to
        self._virtual: Tensor | None = None
        self._handles: tuple[RemovableHandle, ...] = (
            *(table.register_forward_pre_hook(self.before) for table in embeddings),
            *(table.register_forward_hook(self.after) for table in embeddings),
            *(table.register_forward_pre_hook(self.beside) for table in beside),
        )

    @contextmanager
    def lend(self, rows: Tensor | None) -> Iterator[None]:
        """Let ids V, V + 1, … mean ``rows`` ``[N, H]`` inside the context; hold the model's lock around it."""
        previous, self.rows = self.rows, rows
        self._borrower = None if torch.compiler.is_compiling() else threading.get_ident()
        try:
            yield
        finally:
            self.rows, self._virtual = previous, None

    def _is_lent(self) -> bool:
        """Tell whether rows are lent to this thread; the base in other threads has none."""
        if self.rows is None or torch.compiler.is_compiling():
            return self.rows is not None
        return self._borrower in (None, threading.get_ident())

    def remove(self) -> None:
        """Take the hooks off the embedding."""
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: replace virtual ids by a real one and remember where they stood."""
        if not self._is_lent():
            return None
        ids = args[0]
        self._virtual = ids - self.size
        return (torch.where(ids < self.size, ids, 0), *args[1:])

    def beside(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of further tables: give them their padding in the place of virtual ids."""
        if not self._is_lent():
            return None
        padding = getattr(module, "padding_idx", None) or 0
        return (torch.where(args[0] < self.size, args[0], padding), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: put the rows where the virtual ids stood.

        A scale inside the embedding module (Gemma) is bypassed, as in PEFT.
        """
        if self.rows is None or self._virtual is None or not self._is_lent():
            return None
        index, self._virtual = self._virtual, None
        picked = self.rows.to(output.device, output.dtype)[index.clamp(min=0)]
        return torch.where((index >= 0).unsqueeze(-1), picked, output)


def vocabulary_of(model: PreTrainedModel) -> VirtualVocabulary:
    """Hook every table of a model that its input ids are looked up in."""
    table = input_embedding(model)
    tables = {id(table): table}
    if is_encoder_decoder(model):
        other = decoder_embedding(model)
        # A decoder may have other ids than the encoder.
        if isinstance(other, nn.Embedding) and len(other.weight) == len(table.weight):
            tables[id(other)] = other
    return VirtualVocabulary(list(tables.values()), side_embeddings(model))


@contextmanager
def virtual_rows(
    model: PreTrainedModel, rows: Tensor | None, *, decoder: bool = False
) -> Iterator[None]:
    """Let ids from V on mean ``rows`` ``[N, H]`` in the model inside the context, and leave no hook.

    The context holds the model's lock.

    Args:
        model: The model.
        rows: The rows.
        decoder: Whether they stand among the ids of a seq2seq model's decoder instead of its input.
    """
    with locked(model), lent_bodies(frozen_linears(model)), recomputed_alike(model):
        vocabulary = (
            VirtualVocabulary([decoder_embedding(model)]) if decoder else vocabulary_of(model)
        )
        try:
            with vocabulary.lend(rows):
                yield
        finally:
            vocabulary.remove()
