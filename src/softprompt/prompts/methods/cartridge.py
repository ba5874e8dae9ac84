"""Cartridge: a document's keys and values, trained on; the first token, the attention sink, stays as it is.

Layer l attends to ``[K_l; keys of the text]`` and ``[V_l; values of the text]``, K_l and V_l ``[A_kv, P, D]``: the
first ``num_frozen_tokens`` of the P virtual tokens are fixed, the others trained directly, usually from the keys
and values of the document's first P tokens (Eyuboglu et al. 2025, arXiv:2506.06266).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.fields import check_number, setting
from softprompt.prompts import PROMPT_KEY, PeftType, PromptModule, Start, check_fit, check_task, drawing_from
from softprompt.prompts.methods.key_values import FlatOrder, KeyValueConfig


@dataclass
class CartridgeConfig(KeyValueConfig):
    """A cartridge: keys and values ``[L, 2, A_kv, P, D]`` of P virtual tokens, at positions 0 to P - 1."""

    method: ClassVar[PeftType] = PeftType.CARTRIDGE
    text_option: ClassVar[str] = "cartridge_init_text"

    num_frozen_tokens: int = setting(1, "Virtual tokens at the start that are not trained.")
    cartridge_init_text: str | None = setting(
        None, "Text whose keys and values the cartridge starts as.", ours=True
    )

    def __post_init__(self) -> None:
        """Validate the number of frozen tokens and the options of the text.

        Raises:
            ConfigError: If more tokens are frozen than there are, or options would be ignored.
        """
        super().__post_init__()
        self.peft_type = self.method
        frozen = self.num_frozen_tokens
        check_number("num_frozen_tokens", int, frozen, least=0)
        if self.num_virtual_tokens is not None and frozen > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens must be at most num_virtual_tokens={self.num_virtual_tokens}, got {frozen}"
            )
        self.check_text()

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return the untrained module; see ``PromptLearningConfig``."""
        return CartridgeEncoder(self, text=self.initial(start), generator=start.generator)


@final
class CartridgeEncoder(PromptModule):
    """Keys and values of every layer for P virtual tokens, the first of them frozen (Eyuboglu et al. 2025).

    ``frozen_embedding`` ``[F, L·2·A_kv·D]``, None where F is 0, and ``trainable_embedding`` ``[P - F, L·2·A_kv·D]``
    are float32 in PEFT's order; a file holds both together.
    """

    fixed: ClassVar[tuple[str, ...]] = ("frozen_embedding",)
    frozen_embedding: nn.Parameter | None

    def __init__(
        self, config: CartridgeConfig, *, text: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draw the cartridge from N(0, 1), as PEFT does, or start it at a text."""
        super().__init__(config)
        self._order = order = FlatOrder.of(config)
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = order.tokens - config.num_frozen_tokens
        frozen = torch.empty(self.num_frozen_tokens, order.columns, dtype=torch.float32)
        self.frozen_embedding = nn.Parameter(frozen, requires_grad=False) if self.num_frozen_tokens else None
        trainable = torch.empty(self.num_trainable_tokens, order.columns, dtype=torch.float32)
        self.trainable_embedding = nn.Parameter(trainable)
        with drawing_from(generator):
            self.reset_parameters()
        if text is not None:
            self.load_prompt_embeddings(order.flattened(text.float()))

    @property
    def weight(self) -> Tensor:
        """All virtual tokens ``[P, L·2·A_kv·D]``, with gradients for those that are trained."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    @property
    def embedding(self) -> Self:
        """The module itself, so that ``embedding.weight`` is all virtual tokens, as in PEFT's modules."""
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all virtual tokens from N(0, 1), the frozen ones first."""
        if self.frozen_embedding is not None:
            self.frozen_embedding.normal_()
        self.trainable_embedding.normal_()

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Set all virtual tokens, frozen ones included, from ``[P, L·2·A_kv·D]``.

        Raises:
            ArtifactError: If the shape is another one.
        """
        check_fit({PROMPT_KEY: self.weight}, {PROMPT_KEY: prompt_embeddings})
        if self.frozen_embedding is not None:
            self.frozen_embedding.copy_(prompt_embeddings[: self.num_frozen_tokens])
        self.trainable_embedding.copy_(prompt_embeddings[self.num_frozen_tokens :])

    def materialize(self, task: int = 0) -> Tensor:
        """Return keys and values ``[L, 2, A_kv, P, D]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        return self._order.unflattened(self.weight)

    def stored(self) -> dict[str, Tensor]:
        """Return what a file holds, ``[P, L·2·A_kv·D]``; see ``PromptModule`` and ``FlatOrder``."""
        return self._order.stored(self.weight)

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load stored keys and values; see ``PromptModule``."""
        given = self._order.read(tensors)
        check_fit({PROMPT_KEY: self.weight}, given)
        self.load_prompt_embeddings(given[PROMPT_KEY])

    def forward(self, prefix_tokens: Tensor) -> Tensor:
        """Return ``[B, P, L·2·A_kv·D]`` for token ids ``[B, P]``, whose values do not matter, as in PEFT."""
        return self.weight.expand(prefix_tokens.shape[0], -1, -1)
