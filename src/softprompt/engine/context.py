"""Refusing what does not fit into the model's context, with the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone.facts import Facts, input_embedding
from softprompt.engine.rows import EngineRow
from softprompt.errors import ConfigError, ContextOverflowError, DataError


def check_context(
    tokens: int, virtual: int, limit: int | None, *, new: int = 0, what: str = "model"
) -> None:
    """Refuse a row of ``tokens`` behind ``virtual`` prompt rows, with ``new`` tokens to generate.

    Args:
        tokens: Real tokens of the longest row.
        virtual: Virtual tokens before it.
        limit: Positions the model has; None for relative positions, which have no end.
        new: Tokens that generation may add.
        what: Whose limit it is, for the message.

    Raises:
        ContextOverflowError: If they do not fit.
    """
    if limit is None or tokens + virtual + new <= limit:
        return
    parts = f"{tokens:,} + {virtual:,} virtual tokens"
    if new:
        parts += f" + {new:,} new tokens"
    raise ContextOverflowError(
        f"{parts} exceed the {what}'s {limit:,}; shorten the input, the prompt"
        + (" or max_new_tokens" if new else " or lower max_source_length")
    )


def depends_on_neighbours(
    rows: Sequence[EngineRow], prompts: Sequence[Tensor], facts: Facts
) -> bool:
    """Tell whether rows of a batch would change each other's rotary positions (``rope_changes_at``)."""
    if facts.rope_changes_at is None:
        return False
    virtual = [int(prompts[row.prompt].shape[0]) if row.prompt >= 0 else 0 for row in rows]
    lengths = [v + len(r.source) + len(r.target) for v, r in zip(virtual, rows, strict=True)]
    return max(lengths) > facts.rope_changes_at


def check_table(model: PreTrainedModel, facts: Facts) -> None:
    """Refuse a model whose embedding table was resized: virtual ids would silently mean tokens.

    Raises:
        ConfigError: If it has not the size in ``facts``.
    """
    size = int(input_embedding(model).weight.shape[0])
    if size != facts.vocabulary:
        raise ConfigError(
            f"the embedding table had {facts.vocabulary:,} rows when the engine was built, now it has "
            f"{size:,}; resize it first, then build the engine"
        )


def check_rows(
    rows: Sequence[EngineRow], prompts: Sequence[Tensor], facts: Facts, target_limit: int | None
) -> None:
    """Refuse a batch with a row that cannot be run.

    Args:
        rows: The rows.
        prompts: Their prompts ``[P_i, H]``.
        facts: Facts of the model.
        target_limit: Positions of the decoder of a seq2seq model; unused for causal models.

    Raises:
        DataError: If nothing stands before a row's answer, or an id is no token of the model.
        ContextOverflowError: If a row does not fit behind its prompt.
    """
    seq2seq = facts.is_encoder_decoder
    for index, row in enumerate(rows):
        virtual = int(prompts[row.prompt].shape[0]) if row.prompt >= 0 else 0
        if not row.source and not virtual:
            raise DataError(
                f"row {index} has an empty input and no prompt, so nothing stands before its answer; "
                "give it an input or a prompt"
            )
        # From V on ids would silently mean prompt rows. A decoder may have a vocabulary of its own.
        largest = max(row.source + (() if seq2seq else row.target), default=0)
        if largest >= facts.vocabulary:
            raise DataError(
                f"row {index} holds the id {largest:,}, but the model has {facts.vocabulary:,} tokens; "
                "use the tokenizer that belongs to it"
            )
        tokens = len(row.source) + (0 if seq2seq else len(row.target))
        check_context(tokens, virtual, facts.context_length)
        if seq2seq:
            check_context(len(row.target), 0, target_limit, what="decoder")
