"""The tokens that two bases share, as pairs of ids."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def shared_ids(
    first: PreTrainedTokenizerBase,
    second: PreTrainedTokenizerBase,
    rows: tuple[int, int],
) -> tuple[list[int], list[int]]:
    """Return the ids of tokens of equal spelling, in the order of the first vocabulary.

    Special tokens are left out (their names are conventions, their embeddings are not), and so
    are tokens without a row in their base's table.

    Args:
        first: Tokenizer of one base.
        second: Tokenizer of the other.
        rows: Rows of the two embedding tables.
    """
    here, there = first.get_vocab(), second.get_vocab()
    special = {*first.all_special_tokens, *second.all_special_tokens}
    pairs = sorted(
        (own, there[token])
        for token, own in here.items()
        if token in there and token not in special and own < rows[0] and there[token] < rows[1]
    )
    return [own for own, _ in pairs], [other for _, other in pairs]
