"""Context-aware prompt tuning: a context of training examples whose tokens may move a little, but not its labels.

The prompt is ``E_i + Δ_i`` for the P tokens of the context, E ``[P, H]`` their embeddings and Δ ``[P, H]`` trained
with ``‖Δ_i‖ ≤ ε_i``: ε_i is 0 for labels, ``opt_projection_epsilon`` for inputs and
``opt_projection_format_epsilon`` for templates, times ``sqrt(H / 2048)``. The loss is over the labels of the
context as well as the batch's, older examples weighed by ``opt_loss_decay_factor`` (Blau et al. 2024,
arXiv:2410.17222).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softprompt.errors import ConfigError
from softprompt.fields import check_number, setting
from softprompt.prompts import (
    PROMPT_KEY,
    PeftType,
    PromptLearningConfig,
    PromptModule,
    Start,
    TaskType,
    check_task,
    from_tokens,
    lookup,
    take_over,
)

IGNORED = -100
KINDS = 4
"""Token types repeat with this period; see ``CPTConfig``."""
_WEIGHTINGS = ("none", "decay")
_REFERENCE_WIDTH = 2048
_STILL = 1e-10
"""Radius of tokens that may not move, PEFT's."""
_TINY = 1e-30
"""Keeps 0 / 0 out where a radius is 0."""


@dataclass
class CPTConfig(PromptLearningConfig):
    """A context of real tokens, each allowed to move a little from its embedding.

    ``cpt_tokens_type_mask`` says what each token of the context is: 1, 2, 3 and 4 are the template
    before the input, the input, the template before the label and the label of the first example;
    the next example goes on with 5 to 8, and so on; 0 is none of them. Labels do not move; the other
    three move within a ball, whose radius is ``opt_projection_epsilon`` for inputs and
    ``opt_projection_format_epsilon`` for templates, in units of the embedding width over 2048.
    """

    method: ClassVar[PeftType] = PeftType.CPT

    cpt_token_ids: list[int] | None = setting(None, "Token ids of the context; its length is P.")
    cpt_mask: list[int] | None = setting(None, "Attention mask of the context; all ones.")
    cpt_tokens_type_mask: list[int] | None = setting(None, "What each token of the context is.")
    opt_weighted_loss_type: str | None = setting("none", "Weights of the labels in the loss: none or decay.")
    opt_loss_decay_factor: float | None = setting(1.0, "Weight of each label relative to the next one, with decay.")
    opt_projection_epsilon: float | None = setting(0.1, "How far inputs may move.")
    opt_projection_format_epsilon: float | None = setting(0.1, "How far templates may move.")
    tokenizer_name_or_path: str | None = setting(None, "Tokenizer the context was made with, for the record.")

    def __post_init__(self) -> None:
        """Fill in and validate the context.

        Raises:
            ConfigError: For another task than CAUSAL_LM, or a context or numbers that cannot be.
        """
        super().__post_init__()
        self.peft_type = self.method
        self.num_transformer_submodules = 1
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPTConfig only supports task_type = {TaskType.CAUSAL_LM}.")
        self._check_context()
        if self.opt_weighted_loss_type not in _WEIGHTINGS:
            raise ConfigError(
                f"opt_weighted_loss_type must be one of {', '.join(_WEIGHTINGS)}, got "
                f"{self.opt_weighted_loss_type!r}"
            )
        for name in ("loss_decay_factor", "projection_epsilon", "projection_format_epsilon"):
            check_number(f"opt_{name}", float, getattr(self, f"opt_{name}"), least=0, most=1e38)

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return the untrained module; see ``PromptLearningConfig``."""
        self.table_size(word_embeddings.weight.shape[1])
        return CPTEmbedding(self, word_embeddings)

    def _check_context(self) -> None:
        given = self.num_virtual_tokens
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        count = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * count
        if not count == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")
        if count == 0 or given not in (None, count):
            raise ConfigError(
                f"num_virtual_tokens is the length of cpt_token_ids, got {given} and {count} token ids; "
                "leave num_virtual_tokens out, and give at least one token"
            )
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            for value in getattr(self, name):
                check_number(f"each of {name}", int, value, least=0)

    def refuse_ignored(self) -> None:
        """Refuse a mask and a factor without effect; see ``PromptLearningConfig``."""
        if any(value != 1 for value in self.cpt_mask or ()):
            raise ConfigError(
                "cpt_mask must be all ones: a context token with another value would be attended to all the "
                "same; leave such tokens out of cpt_token_ids"
            )
        if self.opt_weighted_loss_type == "none" and self.opt_loss_decay_factor != 1:
            raise ConfigError(
                f"opt_loss_decay_factor={self.opt_loss_decay_factor} would be ignored with "
                "opt_weighted_loss_type none; leave it out, or use decay"
            )


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
        """Embed the context; raises ConfigError also for a token id beyond the base's vocabulary."""
        super().__init__(config)
        vocabulary, width = word_embeddings.weight.shape
        ids = config.cpt_token_ids or []
        self.embedding = nn.Embedding(len(ids), width, dtype=torch.float32)
        if not config.inference_mode:
            if max(ids) >= vocabulary:
                raise ConfigError(
                    f"cpt_token_ids holds {max(ids)}, the base's vocabulary ends at {vocabulary - 1}; "
                    "tokenize the context with the base's own tokenizer"
                )
            first = from_tokens(len(ids), ids, lookup(word_embeddings))
            self.embedding.weight.data.copy_(first)
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(len(ids), width, dtype=torch.float32)
        nn.init.zeros_(self.delta_embedding.weight)
        kinds = torch.tensor(config.cpt_tokens_type_mask)
        self.register_buffer("moves", (kinds % KINDS != 0)[:, None].float(), persistent=False)
        self.register_buffer("radius", _radius(config, kinds, width)[:, None], persistent=False)

    def materialize(self, task: int = 0) -> Tensor:
        """Return the embeddings ``[P, H]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        delta = self.delta_embedding.weight
        # The difference is zero in value; it carries the gradient of the tokens that may move.
        carried = (delta - delta.detach()) * self.moves
        return self.embedding.weight + self._projected(delta) + carried

    def get_projection(self) -> Tensor:
        """Return the moves ``[P, H]`` that count, within their balls, as PEFT's module does."""
        return self._projected(self.delta_embedding.weight)

    def get_epsilon(self) -> Tensor:
        """Return the radius of each token's ball ``[P]``, as PEFT's module does."""
        return self.radius[:, 0]

    @torch.no_grad()
    def project_(self) -> None:
        """Move the parameter to the nearest point of its balls, in place."""
        self.delta_embedding.weight.copy_(self._projected(self.delta_embedding.weight))

    def stored(self) -> dict[str, Tensor]:
        """Return the context with its moves, summed; see ``PromptModule``."""
        return {PROMPT_KEY: self.materialize().detach().cpu().clone()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load stored embeddings, around which the balls lie from then on; see ``PromptModule``."""
        take_over({PROMPT_KEY: self.embedding.weight}, tensors)
        nn.init.zeros_(self.delta_embedding.weight)

    def forward(self, indices: Tensor) -> Tensor:
        """Return embeddings ``[..., H]`` for indices, as PEFT's module does."""
        return self.materialize()[indices]

    @torch.no_grad()
    def _projected(self, delta: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
        return delta * (self.radius / norm.clamp(min=self.radius).clamp(min=_TINY))


def _radius(config: CPTConfig, kinds: Tensor, width: int) -> Tensor:
    of_format = config.opt_projection_format_epsilon
    of_kind = torch.tensor([_STILL, of_format, config.opt_projection_epsilon, of_format])
    of_kind[1:] *= torch.tensor(width / _REFERENCE_WIDTH).sqrt()
    return of_kind[kinds % KINDS]


def cpt_columns(
    config: CPTConfig,
    labels: Tensor,
    type_mask: Tensor | None = None,
    *,
    context: Tensor | None = None,
    text: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return labels and token types ``[B, W]`` of whole rows, context and text.

    The types of the text go on where the context's end: the context's last type is first rounded up
    to a multiple of 4, so that a label stays a label. PEFT does not round; with its default types of 1
    no label is left and its loss is NaN.

    Args:
        config: The context.
        labels: Labels of the text, -100 for none, ``[B, T]``.
        type_mask: Types of the text, as ``cpt_tokens_type_mask`` has them, ``[B, T]``; None makes every
            token a label.
        context: Context token that stands in each column, -1 for none, ``[B, W]``; None with ``text``
            is PEFT's layout, the context before all of the text.
        text: Text column that stands in each column, -1 for none, ``[B, W]``.

    Raises:
        ConfigError: If the types do not have the labels' shape.
    """
    types = torch.full_like(labels, KINDS) if type_mask is None else type_mask.to(labels)
    if types.shape != labels.shape:
        raise ConfigError(
            f"input_type_mask must have the shape of labels, {list(labels.shape)}, got {list(types.shape)}; "
            "give one type a token"
        )
    ids = labels.new_tensor(config.cpt_token_ids)
    kinds = labels.new_tensor(config.cpt_tokens_type_mask)
    ended = -(-int(kinds.max()) // KINDS) * KINDS
    types = torch.where(types > 0, types + ended, types)
    if context is None or text is None:
        rows, count, length = labels.shape[0], ids.shape[0], labels.shape[1]
        column = torch.arange(count + length, device=labels.device).expand(rows, -1)
        context = column.masked_fill(column >= count, -1)
        text = (column - count).clamp(min=-1)
    all_types = _spread(kinds.expand(labels.shape[0], -1), types, context, text, 0)
    all_labels = _spread(ids.expand(labels.shape[0], -1), labels, context, text, IGNORED)
    return all_labels.masked_fill(~_is_label(all_types), IGNORED), all_types


def cpt_loss(logits: Tensor, labels: Tensor, types: Tensor, config: CPTConfig) -> Tensor:
    """Return the weighted mean of the labels' losses, a scalar.

    With ``decay`` the last example of a row weighs 1 and each one before it ``opt_loss_decay_factor`` of
    the next; the mean still divides by the number of labels, as in PEFT.

    Args:
        logits: ``[B, W, V]``; column c predicts the label of column c + 1.
        labels: As ``cpt_columns`` returns them, ``[B, W]``.
        types: As ``cpt_columns`` returns them, ``[B, W]``.
        config: The weighting.
    """
    labels, types = labels[:, 1:].to(logits.device), types[:, 1:].to(logits.device)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view_as(labels)
    if config.opt_weighted_loss_type == "decay":
        losses = losses * _decay(types, config.opt_loss_decay_factor or 0.0)
    return losses[labels != IGNORED].mean()


@dataclass(frozen=True, slots=True)
class ContextLabel:
    """A label in a context.

    Attributes:
        start: Tokens of the context before it.
        ids: Its token ids.
        weight: What it weighs in the loss of a row, whose own label weighs 1.
    """

    start: int
    ids: tuple[int, ...]
    weight: float


def context_labels(config: CPTConfig) -> tuple[ContextLabel, ...]:
    """Return the labels in a context that something stands before, in order; see ``cpt_loss``."""
    kinds, ids = config.cpt_tokens_type_mask or [], config.cpt_token_ids or []
    examples = {kind for kind in kinds if kind > 0 and kind % KINDS == 0}
    decays = config.opt_weighted_loss_type == "decay"
    factor = (config.opt_loss_decay_factor or 0.0) if decays else 1.0
    found, start = [], 0
    for kind, run in groupby(kinds):
        end = start + len(list(run))
        first = max(start, 1)
        if kind in examples and first < end:
            later = 1 + sum(other > kind for other in examples)
            found.append(ContextLabel(first, tuple(ids[first:end]), factor**later))
        start = end
    return tuple(found)


def _decay(types: Tensor, factor: float) -> Tensor:
    weights = torch.ones_like(types, dtype=torch.float32)
    for row, weight in zip(types, weights, strict=True):
        examples = row[_is_label(row)].unique()
        later = (examples > row[:, None]).sum(dim=1)
        weight.copy_(factor**later)
    return weights


def _is_label(types: Tensor) -> Tensor:
    return (types > 0) & (types % KINDS == 0)


def _spread(context: Tensor, text: Tensor, slots: Tensor, columns: Tensor, fill: int) -> Tensor:
    """Return ``[B, W]``: values of the context and of the text ``[B, P]`` and ``[B, T]`` in their columns."""
    of_context = context.gather(1, slots.clamp(min=0))
    of_text = text.gather(1, columns.clamp(min=0))
    placed = torch.where(columns >= 0, of_text, torch.full_like(of_text, fill))
    return torch.where(slots >= 0, of_context, placed)
