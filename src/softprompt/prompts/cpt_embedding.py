"""The trainable module of context-aware prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.prompts.cpt import KINDS, CPTConfig
from softprompt.prompts.initialisers import from_tokens
from softprompt.prompts.module import PROMPT_KEY, PromptModule, check_task, take_over

_REFERENCE_WIDTH = 2048
_STILL = 1e-10
"""Radius of tokens that may not move, PEFT's."""
_TINY = 1e-30
"""Keeps 0 / 0 out where a radius is 0."""


@final
class CPTEmbedding(PromptModule):
    """The embeddings of a context, plus a learned move of each token within a ball (Blau et al. 2024).

    ``embedding.weight`` ``[P, H]`` is never trained, ``delta_embedding.weight`` ``[P, H]`` is. PEFT moves
    the parameter itself back into its ball in every forward pass; here ``materialize`` uses the nearest
    point of the ball and passes gradients on as if it were the parameter, and ``project_`` moves the
    parameter. Calling it after each update, or before each forward pass, gives PEFT's trajectory.

    What is saved is the sum; a loaded prompt starts at it with moves of zero, as in PEFT.
    """

    fixed: ClassVar[tuple[str, ...]] = ("embedding.weight",)
    moves: Tensor
    radius: Tensor

    def __init__(self, config: CPTConfig, word_embeddings: nn.Embedding) -> None:
        """Embed the context; under ``inference_mode`` nothing is looked up, the rows are about to be loaded.

        Args:
            config: What to create.
            word_embeddings: The base's embedding module.

        Raises:
            ConfigError: If a token id is beyond the base's vocabulary.
        """
        super().__init__()
        vocabulary, width = word_embeddings.weight.shape
        ids = config.cpt_token_ids or []
        self.embedding = nn.Embedding(len(ids), width, dtype=torch.float32)
        if not config.inference_mode:
            if max(ids) >= vocabulary:
                raise ConfigError(
                    f"cpt_token_ids holds {max(ids)}, the base's vocabulary ends at {vocabulary - 1}; "
                    "tokenize the context with the base's own tokenizer"
                )
            device = word_embeddings.weight.device
            rows = from_tokens(len(ids), ids, lambda each: word_embeddings(each.to(device)))
            self.embedding.weight.data.copy_(rows)
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(len(ids), width, dtype=torch.float32)
        nn.init.zeros_(self.delta_embedding.weight)
        kinds = torch.tensor(config.cpt_tokens_type_mask)
        self.register_buffer("moves", (kinds % KINDS != 0)[:, None].float(), persistent=False)
        self.register_buffer("radius", _radius(config, kinds, width)[:, None], persistent=False)

    def materialize(self, task: int = 0) -> Tensor:
        """Return the rows ``[P, H]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        delta = self.delta_embedding.weight
        # The difference is zero in value; it carries the gradient of the tokens that may move.
        carried = (delta - delta.detach()) * self.moves
        return self.embedding.weight + self._projected(delta) + carried

    @torch.no_grad()
    def project_(self) -> None:
        """Move the parameter to the nearest point of its balls, in place."""
        self.delta_embedding.weight.copy_(self._projected(self.delta_embedding.weight))

    def stored(self) -> dict[str, Tensor]:
        """Return the context with its moves, summed; see ``PromptModule``."""
        return {PROMPT_KEY: self.materialize().detach().cpu().clone()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored rows, around which the balls lie from then on; see ``PromptModule``."""
        take_over({PROMPT_KEY: self.embedding.weight}, tensors)
        nn.init.zeros_(self.delta_embedding.weight)

    def forward(self, indices: Tensor) -> Tensor:
        """Return rows ``[..., H]`` for indices, as PEFT's module does."""
        return self.materialize()[indices]

    @torch.no_grad()
    def _projected(self, delta: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
        return delta * (self.radius / norm.clamp(min=self.radius).clamp(min=_TINY))


def _radius(config: CPTConfig, kinds: Tensor, width: int) -> Tensor:
    scale = torch.tensor(width / _REFERENCE_WIDTH).sqrt()
    of_kind = torch.tensor(
        [
            _STILL,
            config.opt_projection_format_epsilon,
            config.opt_projection_epsilon,
            config.opt_projection_format_epsilon,
        ]
    )
    of_kind[1:] *= scale
    return of_kind[kinds % KINDS]
