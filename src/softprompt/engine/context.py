"""Refusing what does not fit into the model's context, with the numbers."""

from __future__ import annotations

from softprompt.errors import ContextOverflowError


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
