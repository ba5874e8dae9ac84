"""The loss of context-aware prompt tuning: over the labels of the context and of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from softprompt.errors import ConfigError
from softprompt.prompts.cpt import KINDS, CPTConfig

IGNORED = -100


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
        place = torch.arange(count + length, device=labels.device).expand(rows, -1)
        context = place.masked_fill(place >= count, -1)
        text = (place - count).clamp(min=-1)
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
        logits[:, :-1].flatten(0, 1).float(),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORED,
    ).view_as(labels)
    if config.opt_weighted_loss_type == "decay":
        losses = losses * _decay(types, config.opt_loss_decay_factor or 0.0)
    return losses[labels != IGNORED].mean()


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
    """Return ``[B, W]``: values of the context and of the text ``[B, P]`` and ``[B, T]`` at their places."""
    of_context = context.gather(1, slots.clamp(min=0))
    of_text = text.gather(1, columns.clamp(min=0))
    placed = torch.where(columns >= 0, of_text, torch.full_like(of_text, fill))
    return torch.where(slots >= 0, of_context, placed)
