"""Prefix tuning: the prompt is keys and values of every layer, before those of the text.

Layer l attends to ``[K_l; keys of the text]`` and ``[V_l; values of the text]``, K_l and V_l ``[A_kv, P, D]``
trained directly, or as ``tanh(E W_1 + b_1) W_2 + b_2`` with E ``[P, A_kv·D]`` (Li and Liang 2021,
arXiv:2101.00190).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from softprompt.errors import ArtifactError, ConfigError, nearest
from softprompt.fields import check_number, setting
from softprompt.prompts import PROMPT_KEY, PeftType, PromptModule, Start, check_task, drawing_from, take_over
from softprompt.prompts.methods.key_values import FlatOrder, KeyValueConfig


@dataclass
class PrefixTuningConfig(KeyValueConfig):
    """Prefix tuning: keys and values ``[L, 2, A_kv, P, D]`` of P virtual tokens, at positions 0 to P - 1.

    ``freeze_first_token`` only matters when a prefix is made, so it is no part of its file. For seq2seq
    models the prefix stands before the decoder's own tokens.
    """

    method: ClassVar[PeftType] = PeftType.PREFIX_TUNING
    text_option: ClassVar[str] = "prefix_tuning_init_text"

    init_weights: str | None = setting(None, 'First values: "zero", or random when left out.')
    encoder_hidden_size: int | None = setting(None, "Inner width of the projection.")
    prefix_projection: bool = setting(False, "Train a small network that makes the keys and values.")
    prefix_tuning_init_text: str | None = setting(
        None, "Text whose keys and values the prefix starts as.", ours=True
    )
    freeze_first_token: bool = setting(
        False, "Do not train the first token of the text, the attention sink.", ours=True
    )

    def __post_init__(self) -> None:
        """Validate the initialisation.

        Raises:
            ConfigError: For an unknown initialisation, or settings that lack others or would be ignored.
        """
        super().__post_init__()
        self.peft_type = self.method
        if self.init_weights not in (None, "zero"):
            raise ConfigError(
                f'init_weights must be "zero" or None, got {self.init_weights!r}'
                f"{nearest(str(self.init_weights), ['zero'])}"
            )
        if self.encoder_hidden_size is not None:
            check_number("encoder_hidden_size", int, self.encoder_hidden_size, least=1)
        self.check_text("freeze_first_token")
        for name in ("init_weights", "prefix_projection"):
            if getattr(self, name) and self.prefix_tuning_init_text is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} does not go with prefix_tuning_init_text, whose keys "
                    "and values are the first values; leave one of them out"
                )

    def refuse_ignored(self) -> None:
        """Refuse a width of a projection that is not there; see ``PromptLearningConfig``."""
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ConfigError(
                "encoder_hidden_size would be ignored without prefix_projection=True; set that, or leave it out"
            )

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return the untrained module; see ``PromptLearningConfig``."""
        return PrefixEncoder(self, text=self.initial(start), generator=start.generator)


@final
class PrefixEncoder(PromptModule):
    """Keys and values of every layer for P virtual tokens (Li and Liang 2021).

    Trained directly they are ``embedding.weight``, float32 ``[P, L·2·A_kv·D]`` in PEFT's order; with a
    projection they are ``transform(embedding.weight)`` of embeddings ``[P, A_kv·D]``. A file holds them
    baked, so what is loaded is always direct.
    """

    first: Tensor | None
    """Keys and values of the frozen first token ``[1, L·2·A_kv·D]``."""

    def __init__(
        self, config: PrefixTuningConfig, *, text: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Create and initialise the prefix."""
        super().__init__(config)
        self._order = order = FlatOrder.of(config)
        width = order.heads * order.width
        self.transform: nn.Sequential | None = None
        self.register_buffer("first", None)
        with drawing_from(generator):
            if config.prefix_projection and not config.inference_mode:
                hidden = config.encoder_hidden_size or width
                self.embedding = nn.Embedding(order.tokens, width, dtype=torch.float32)
                self.transform = nn.Sequential(
                    nn.Linear(width, hidden, dtype=torch.float32),
                    nn.Tanh(),
                    nn.Linear(hidden, order.columns, dtype=torch.float32),
                )
            else:
                self.embedding = nn.Embedding(order.tokens, order.columns, dtype=torch.float32)
        self._initialise(config, text)

    @torch.no_grad()
    def _initialise(self, config: PrefixTuningConfig, text: Tensor | None) -> None:
        if config.init_weights == "zero" and not config.inference_mode:
            zeroed = self.embedding if self.transform is None else self.transform[-1]
            for parameter in zeroed.parameters():
                parameter.zero_()
        if text is not None:
            self.embedding.weight.copy_(self._order.flattened(text.float()))
        if config.freeze_first_token:
            self.first = self.embedding.weight[:1].clone()

    def materialize(self, task: int = 0) -> Tensor:
        """Return keys and values ``[L, 2, A_kv, P, D]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        return self._order.unflattened(self._flat())

    def stored(self) -> dict[str, Tensor]:
        """Return what a file holds, ``[P, L·2·A_kv·D]``; see ``PromptModule`` and ``FlatOrder``."""
        return self._order.stored(self._flat())

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load stored keys and values; see ``PromptModule``.

        Raises:
            ArtifactError: Also for a projection, whose parameters the values do not tell.
        """
        if self.transform is not None:
            raise ArtifactError(
                "saved keys and values do not tell the parameters of prefix_projection; attach the prompt "
                "with inference_mode=True, or train them directly"
            )
        take_over({PROMPT_KEY: self.embedding.weight}, self._order.read(tensors))
        if self.first is not None:
            self.first = self.embedding.weight.detach()[:1].clone()

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Set all virtual tokens from ``[P, L·2·A_kv·D]``; see ``load_stored``."""
        self.load_stored({PROMPT_KEY: prompt_embeddings})

    def _flat(self) -> Tensor:
        flat: Tensor = self.embedding.weight
        if self.transform is not None:
            flat = self.transform(flat)
        return flat if self.first is None else torch.cat([self.first, flat[1:]])
