"""Shared tokens by their spelling."""

from __future__ import annotations

from oracles.tokenizers import byte_bpe
from softprompt.backbone.vocabulary import shared_ids


def test_shared_tokens_have_the_same_spelling_and_are_not_special():
    small, large = byte_bpe(vocabulary=280), byte_bpe(vocabulary=320)
    here, there = shared_ids(small, large, (len(small), len(large)))
    assert small.convert_ids_to_tokens(here) == large.convert_ids_to_tokens(there)
    assert here == sorted(here)
    assert len(here) == len(small) - 4
    assert not {*small.all_special_ids} & {*here}


def test_tokens_without_a_row_are_left_out():
    words = byte_bpe()
    here, there = shared_ids(words, words, (100, 50))
    assert here == there == [i for i in range(50) if i not in words.all_special_ids]
