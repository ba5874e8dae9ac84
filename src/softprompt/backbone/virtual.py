"""To transformers a prompt is vocabulary: its virtual tokens have ids from V on.

``VirtualVocabulary`` hooks the input embedding. While virtual tokens are injected, ids below V are
looked up in the frozen table and the others among them; otherwise it does nothing, so the base
model behaves, bit for bit, as if nobody had touched it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from softprompt.backbone.state import decoder_embedding, input_embedding, is_encoder_decoder, side_embeddings


@final
class VirtualVocabulary:
    """Virtual tokens behind the vocabulary of a model's embedding modules, which all have V ids.

    A plain object, not closures, so that a model that carries it can be copied and pickled.

    Attributes:
        size: The ids of the tables (V).
        virtual_tokens: What is injected now, ``[N, H]``: number n has id V + n; None when nothing is.
    """

    def __init__(self, embeddings: Sequence[nn.Embedding], beside: Sequence[nn.Embedding] = ()) -> None:
        """Hook embeddings.

        Args:
            embeddings: The input embedding; for seq2seq models the decoder's too.
            beside: Further tables that are given the same ids (per-layer embeddings of Gemma); a
                virtual id means their padding, as an image token does there.
        """
        self.size = int(embeddings[0].weight.shape[0])
        self.virtual_tokens: Tensor | None = None
        self._thread: int | None = None  # the one they are injected for
        self._index: Tensor | None = None
        self._handles: tuple[RemovableHandle, ...] = (
            *(table.register_forward_pre_hook(self.before) for table in embeddings),
            *(table.register_forward_hook(self.after) for table in embeddings),
            *(table.register_forward_pre_hook(self.beside) for table in beside),
        )

    @contextmanager
    def inject(self, virtual_tokens: Tensor | None) -> Iterator[None]:
        """Let ids V, V + 1, … mean ``virtual_tokens`` ``[N, H]`` inside the context.

        Hold the model's lock around it.
        """
        previous, self.virtual_tokens = self.virtual_tokens, virtual_tokens
        self._thread = None if torch.compiler.is_compiling() else threading.get_ident()
        try:
            yield
        finally:
            self.virtual_tokens, self._index = previous, None

    def _is_injected(self) -> bool:
        """Tell whether this thread has virtual tokens; the base in other threads has none."""
        if self.virtual_tokens is None or torch.compiler.is_compiling():
            return self.virtual_tokens is not None
        return self._thread in (None, threading.get_ident())

    def remove(self) -> None:
        """Take the hooks off the embeddings."""
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook: replace virtual ids by a real one and remember where they stood."""
        if not self._is_injected():
            return None
        ids = args[0]
        self._index = ids - self.size
        return (torch.where(ids < self.size, ids, 0), *args[1:])

    def beside(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of further tables: give them their padding in place of virtual ids."""
        if not self._is_injected():
            return None
        padding = getattr(module, "padding_idx", None) or 0
        return (torch.where(args[0] < self.size, args[0], padding), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: put the virtual tokens where their ids stood.

        A scale inside the embedding module (Gemma) is bypassed, as in PEFT.
        """
        if self.virtual_tokens is None or self._index is None or not self._is_injected():
            return None
        index, self._index = self._index, None
        picked = self.virtual_tokens.to(output.device, output.dtype)[index.clamp(min=0)]
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


def injected(
    model: PreTrainedModel,
    virtual_tokens: Tensor | None,
    vocabulary: VirtualVocabulary | None = None,
    *,
    decoder: bool = False,
) -> AbstractContextManager[None]:
    """Let ids from V on mean ``virtual_tokens`` ``[N, H]`` in the model inside the context.

    Args:
        model: The model; hold its lock around the context.
        virtual_tokens: The virtual tokens, or None.
        vocabulary: Hooks to inject them through; by default hooks are made where they are needed, and removed.
        decoder: Whether they stand among the ids of a seq2seq model's decoder instead of its input.
    """
    if vocabulary is not None:
        return vocabulary.inject(virtual_tokens)
    return nullcontext() if virtual_tokens is None else _hooked(model, virtual_tokens, decoder)


@contextmanager
def _hooked(model: PreTrainedModel, virtual_tokens: Tensor, decoder: bool) -> Iterator[None]:
    vocabulary = VirtualVocabulary([decoder_embedding(model)]) if decoder else vocabulary_of(model)
    try:
        with vocabulary.inject(virtual_tokens):
            yield
    finally:
        vocabulary.remove()
