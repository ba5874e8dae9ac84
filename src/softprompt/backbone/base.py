"""The frozen model, and the one way in which it is run with prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.backbone.attention import recomputed_alike, supported, switched
from softprompt.backbone.facts import Facts, facts_of
from softprompt.backbone.fingerprint import Fingerprint
from softprompt.backbone.keyvalues import KeyValueShape, key_value_shape, prefix_sources
from softprompt.backbone.passes import unpacked
from softprompt.backbone.products import FrozenLinear, frozen_linears, swapped_forwards, torch_products
from softprompt.backbone.sharding import passes_together, shard_of
from softprompt.backbone.state import (
    device_of,
    input_embedding,
    is_encoder_decoder,
    locked,
    resting,
    stamp_of,
    state_of,
)
from softprompt.backbone.virtual import VirtualVocabulary, injected
from softprompt.errors import BackboneError

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True, init=False, repr=False)
class Base:
    """A frozen model with its tokenizer; a light handle, made wherever one is needed.

    What is read or found of a model, and its lock, are shared by all handles on it.

    Attributes:
        model: The model.
        name: Folder, Hub id or ``"demo"``; empty where it is not known.
    """

    model: PreTrainedModel
    name: str
    _tokenizer: PreTrainedTokenizerBase | None

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = ""
    ) -> None:
        for attribute, value in (("model", model), ("name", name), ("_tokenizer", tokenizer)):
            object.__setattr__(self, attribute, value)

    @staticmethod
    def of(model: PreTrainedModel | Base) -> Base:
        """Return a handle on a model; a handle is returned as it is."""
        return model if isinstance(model, Base) else Base(model)

    def __repr__(self) -> str:
        return f"Base({type(self.model).__name__}, name={self.name!r})"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            BackboneError: If the handle was made without one.
        """
        if self._tokenizer is None:
            raise BackboneError(
                f"no tokenizer was given with this {type(self.model).__name__}; use "
                "Base(model, tokenizer), or load_base, which finds the tokenizer beside the model"
            )
        return self._tokenizer

    @property
    def facts(self) -> Facts:
        """Sizes and habits of the model, read once.

        Raises:
            BackboneError: If it has no input embedding or its config lacks a size.
        """
        return facts_of(self.model)

    @property
    def fingerprint(self) -> Fingerprint:
        """What recognises the model by its weights; taken once for each state of them."""
        return fingerprint_of(self.model)

    def fingerprint_record(self) -> dict[str, Any]:
        """Return the fingerprint for a file; empty where it cannot be taken, for no prompt may be lost over it.

        A module that is no model of transformers has none: nothing says which model it is.
        """
        if not self.model.config.model_type:
            return {}
        try:
            return self.fingerprint.to_dict()
        except Exception as cause:  # whatever a quantised or offloaded weight raises when it is read
            logger.warning(
                "no fingerprint of %s can be taken (%r), so the prompt is saved without one: nothing will "
                "tell whether a base is the one it was made for",
                type(self.model).__name__,
                cause,
            )
            return {}

    @property
    def key_value_shape(self) -> KeyValueShape:
        """Sizes of the keys and values of its layers, found once without a pass.

        Raises:
            BackboneError: If its layers keep anything else.
        """
        return key_value_shape(self.model)

    @property
    def prefix_sources(self) -> tuple[int | None, ...] | None:
        """The layer whose prefix each layer reads, None for none; None where each reads its own.

        Raises:
            BackboneError: If no layer can read one.
        """
        return prefix_sources(self.model)

    @property
    def found(self) -> dict[str, Any]:
        """What probes found of the model, by name; no value may hold the model."""
        return state_of(self.model).found

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The model's re-entrant lock, for ``with``; ``running`` holds it by itself."""
        return locked(self.model)

    @property
    def device(self) -> torch.device:
        """The device that it takes its inputs on: of its first weight, where that is not offloaded."""
        return device_of(self.model)

    @property
    def shard(self) -> str:
        """How its weights are spread over processes, "fsdp" or "tp"; empty where each process has all of them."""
        return shard_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first weight."""
        return self.model.dtype

    @property
    def embedding(self) -> nn.Embedding:
        """The module that embeds the ids a prompt stands before (the encoder's, where there is one).

        Raises:
            BackboneError: If the model has none.
        """
        return input_embedding(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return is_encoder_decoder(self.model)

    def require_attention(self, name: str) -> None:
        """Check that ``running(attention=name)`` is supported, so that later passes need not.

        Raises:
            BackboneError: If the model does not honour transformers' attention interface.
        """
        supported(self.model, name)

    @contextmanager
    def running(
        self,
        *,
        attention: str | None = None,
        virtual_tokens: Tensor | None = None,
        decoder: bool = False,
        vocabulary: VirtualVocabulary | None = None,
        products: Iterable[FrozenLinear] | None = None,
        bare: bool = False,
    ) -> Iterator[None]:
        """Prepare the model for passes inside the context, one thread at a time, and leave nothing behind.

        Contexts nest: an inner one adds to the outer one's, and gives back what it changed. Layers that
        are checkpointed inside are run again by backward as they were run here.

        Args:
            attention: Name of the attention implementation, registered with transformers; None keeps
                the one that is set.
            virtual_tokens: What ids from V on mean, ``[N, H]``.
            decoder: Whether they stand among the ids of a seq2seq model's decoder instead of its input.
            vocabulary: Hooks that are on the embeddings already, to inject the virtual tokens through
                (or none, also where an outer context has some); by default hooks are made and removed.
            products: Bodies for linear layers, from ``frozen_linears``; None looks for them.
            bare: Leave every product to torch, as without us; so do contexts inside this one.

        Raises:
            BackboneError: If the model does not honour transformers' attention interface.
        """
        model = self.model
        with (
            locked(model),
            passes_together(model),
            unpacked(model),
            nullcontext() if attention is None else switched(supported(model, attention)),
            torch_products() if bare and not torch.compiler.is_compiling() else nullcontext(),
            swapped_forwards(frozen_linears(model) if products is None else products),
            recomputed_alike(model),
            injected(model, virtual_tokens, vocabulary, decoder=decoder),
        ):
            yield


def freeze(model: nn.Module) -> None:
    """Take every parameter out of training."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def fingerprint_of(model: PreTrainedModel) -> Fingerprint:
    """Return the fingerprint of a model, taken once for each state of its weights.

    It is taken again after a weight was written to, replaced, moved or converted; a write through
    ``weight.data`` leaves no trace, so ``Fingerprint.of`` is for weights that somebody edits so.
    """
    with resting(model):
        stamp = tuple(stamp_of(weight) for weight in model.base_model.parameters())
        return state_of(model).once("fingerprint", lambda: Fingerprint.of(model), stamp)
