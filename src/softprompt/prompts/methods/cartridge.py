"""Cartridge: a document's keys and values, trained on; the first token, the attention sink, stays as it is.

Layer l attends to ``[K_l; keys of the text]`` and ``[V_l; values of the text]``, K_l and V_l ``[A_kv, P, D]``: the
first ``num_frozen_tokens`` of the P virtual tokens are fixed, the others trained directly, usually from the keys
and values of the document's first P tokens (Eyuboglu et al. 2025, arXiv:2506.06266).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.fields import setting
from softprompt.prompts import (
    PROMPT_KEY,
    PeftType,
    PromptLearningConfig,
    PromptModule,
    Start,
    check_fit,
    check_task,
    drawing_from,
    positive,
)
from softprompt.prompts.methods.key_values import (
    FlatOrder,
    check_text,
    initial_key_values,
    seq2seq_sizes,
)


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """A cartridge: keys and values ``[L, 2, A_kv, P, D]`` of P virtual tokens, at positions 0 to P - 1.

    ``token_dim`` is A_kv times D and ``num_attention_heads`` is A_kv, as PEFT writes them for grouped
    queries. The settings of the text only matter when a cartridge is made, so they are no part of its file.
    """

    keys_and_values: ClassVar[bool] = True

    num_frozen_tokens: int = setting(1, "Virtual tokens at the start that are not trained.")
    cartridge_init_text: str | None = setting(
        None, "Text whose keys and values the cartridge starts as.", ours=True
    )
    tokenizer_name_or_path: str | None = setting(None, "Tokenizer of the text.", ours=True)
    tokenizer_kwargs: dict[str, Any] | None = setting(
        None, "Keyword arguments of the tokenizer.", ours=True
    )

    def __post_init__(self) -> None:
        """Validate the number of frozen tokens and the options of the text.

        Raises:
            ConfigError: If more tokens are frozen than there are, or options would be ignored.
        """
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        frozen = positive("num_frozen_tokens", self.num_frozen_tokens, least=0)
        if self.num_virtual_tokens is not None and frozen > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens must be at most num_virtual_tokens={self.num_virtual_tokens}, got {frozen}"
            )
        check_text(self, "cartridge_init_text", ("tokenizer_name_or_path", "tokenizer_kwargs"))

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return the untrained module; see ``PromptLearningConfig``."""
        text = initial_key_values(self, "cartridge_init_text", start.key_values)
        return CartridgeEncoder(self, text=text, generator=start.generator)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under PEFT's keys; see ``key_values.seq2seq_sizes``."""
        return super().to_dict() | seq2seq_sizes(self)


@final
class CartridgeEncoder(PromptModule):
    """Keys and values of every layer for P virtual tokens, the first of them frozen (Eyuboglu et al. 2025).

    ``frozen_embedding`` ``[F, L·2·A_kv·D]``, None where F is 0, and ``trainable_embedding`` ``[P - F, L·2·A_kv·D]``
    are float32 in PEFT's order; a file holds both together.
    """

    fixed: ClassVar[tuple[str, ...]] = ("frozen_embedding",)
    frozen_embedding: nn.Parameter | None

    def __init__(
        self,
        config: CartridgeConfig,
        *,
        text: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create the cartridge and draw it from N(0, 1), as PEFT does, or start it at a text.

        Args:
            config: What to create; its length and sizes are needed.
            text: Keys and values of the initial text, ``[L, 2, A_kv, P, D]``.
            generator: Source of randomness; None is torch's global one, drawn from in PEFT's order.

        Raises:
            ConfigError: If the config lacks a size, or the text's values have another shape.
        """
        super().__init__(config)
        self._order = order = FlatOrder.of(config)
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = order.tokens - config.num_frozen_tokens
        frozen = torch.empty(self.num_frozen_tokens, order.columns, dtype=torch.float32)
        self.frozen_embedding = (
            nn.Parameter(frozen, requires_grad=False) if self.num_frozen_tokens else None
        )
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
