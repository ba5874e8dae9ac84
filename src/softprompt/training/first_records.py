"""The first training records as a start: tokens whose keys and values are taken over, and CPT's context."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from softprompt.data import RowTokenizer, TokenRow
from softprompt.prompts import CPTConfig

_BEFORE, _INPUT, _AFTER, _LABEL = 1, 2, 3, 4
"""What a token of an example is: template before the input, input, template behind it, label."""


def first_tokens(rows: Sequence[TokenRow], count: int, tokenizer: RowTokenizer) -> list[int]:
    """Return tokens of the first records, one behind the other; repeated where there are too few.

    Args:
        rows: The records, at least one.
        count: Tokens wanted.
        tokenizer: What tokenised the records.
    """
    ids: list[int] = []
    for number, row in enumerate(rows):
        ids += (*row.source[_starts_text(row, number, tokenizer) :], *row.target)
        if len(ids) >= count:
            break
    return (ids * -(-count // len(ids)))[:count]


def with_context(
    config: CPTConfig,
    rows: Sequence[TokenRow],
    tokenizer: RowTokenizer,
    *,
    count: int,
    room: int | None,
) -> tuple[CPTConfig, int]:
    """Return a configuration whose context is the first records, and how many these are.

    Args:
        config: The other options.
        rows: The records, at least one.
        tokenizer: What tokenised the records; tells the template's tokens from the input's.
        count: Records wanted.
        room: Tokens that the context may have; one record is taken whether it fits or not. None is no limit.
    """
    ids: list[int] = []
    kinds: list[int] = []
    used = 0
    for number, row in enumerate(rows[:count]):
        own_ids, own_kinds = _example(row, number, tokenizer)
        if used and room is not None and len(ids) + len(own_ids) > room:
            break
        ids += own_ids
        kinds += own_kinds
        used += 1
    made = dataclasses.replace(
        config,
        num_virtual_tokens=None,
        cpt_token_ids=ids,
        cpt_mask=None,
        cpt_tokens_type_mask=kinds,
    )
    return made, used


def _example(row: TokenRow, number: int, tokenizer: RowTokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of a record and what each of them is, as ``cpt_tokens_type_mask`` has it."""
    empty, _ = tokenizer.source(dict.fromkeys(tokenizer.verbalizer.fields, ""))
    most = min(len(row.source), len(empty))
    before = _shared(row.source, empty, most)
    after = _shared(row.source[::-1], empty[::-1], most - before)
    inside = len(row.source) - before - after
    kinds = [_BEFORE] * before + [_INPUT] * inside + [_AFTER] * after + [_LABEL] * len(row.target)
    start = _starts_text(row, number, tokenizer)
    ids = [*row.source, *row.target]
    return ids[start:], [kind + _LABEL * number for kind in kinds[start:]]


def _shared(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Return how many tokens two texts have in common at their start."""
    pairs = zip(one[:most], other[:most], strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), most)


def _starts_text(row: TokenRow, number: int, tokenizer: RowTokenizer) -> int:
    """Return how many tokens to leave out: the token that starts every text stands in front alone."""
    bos = tokenizer.tokenizer.bos_token_id
    return int(number > 0 and bos is not None and row.source[:1] == (bos,))
