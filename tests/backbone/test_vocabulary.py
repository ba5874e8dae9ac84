"""Shared tokens by their spelling."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oracles.tokenizers import byte_bpe
from softprompt.backbone import shared_ids
from softprompt.backbone.vocabulary import _letters


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


def spelt(*tokens):
    """A tokenizer whose vocabulary is these tokens, ids in their order."""
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


BYTES = spelt("<unk>", "Ġthe", "the", "ing", "Ã©", "Ġ", "Ċ", "Ġcat", "▁", "Ġ##")
PIECES = spelt("<unk>", "▁cat", "the", "<0x0A>", "▁the", "é", "<0x74>", "t", "▁")
WORDS = spelt("<unk>", "the", "##ing", "##the", "cat", "##é", "##s")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            BYTES,
            PIECES,
            {"Ġthe": "▁the", "the": "the", "Ã©": "é", "Ġ": "▁", "Ċ": "<0x0A>", "Ġcat": "▁cat"},
        ),
        (PIECES, WORDS, {"▁cat": "cat", "the": "##the", "▁the": "the", "é": "##é"}),
        (
            BYTES,
            WORDS,
            {"Ġthe": "the", "the": "##the", "ing": "##ing", "Ã©": "##é", "Ġcat": "cat"},
        ),
        (BYTES, BYTES, {t: t for t in BYTES.get_vocab() if t != "<unk>"}),
    ],
)
def test_kinds_of_tokenizers_are_compared_by_what_tokens_say(first, second, expected):
    for one, other, pairs in (
        (first, second, expected),
        (second, first, {b: a for a, b in expected.items()}),
    ):
        here, there = shared_ids(one, other, (len(one), len(other)))
        tokens = one.convert_ids_to_tokens(here), other.convert_ids_to_tokens(there)
        assert dict(zip(*tokens, strict=True)) == pairs


def test_bytes_spelt_as_tokens_do_not_hide_text():
    here, there = shared_ids(BYTES, spelt("<unk>", "▁x", "<0x74>", "t"), (20, 20))
    assert (here, there) == ([], [])
    here, there = shared_ids(spelt("<unk>", "Ġ", "t"), PIECES, (20, 20))
    assert PIECES.convert_ids_to_tokens(there) == ["▁", "t"]


def test_the_letters_are_those_of_the_tokenizers_library():
    assert set(_letters()) == set(pre_tokenizers.ByteLevel.alphabet())
    for text in ("é", " the\n", "日本", "\x00\x7f\xad"):
        spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ((letters, _),) = spelling.pre_tokenize_str(text)
        assert bytes(_letters()[letter] for letter in letters) == text.encode()
