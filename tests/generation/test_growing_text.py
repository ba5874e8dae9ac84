"""The text of a growing answer: whole characters, held back stops, and nothing lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.solo import ending
from oracles.tokenizers import byte_bpe
from softprompt.generation import GenerationOptions
from softprompt.generation.answer import GrowingText, StopSequences

TOKENIZER = byte_bpe()


def decode(ids):
    text = TOKENIZER.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(" ")


def grown(tokens, stops=()):
    """Return pieces and the text at the end, as an answer would take them."""
    text = GrowingText(decode, StopSequences(tuple(stops), 0, decode))
    pieces = []
    for count in range(1, len(tokens) + 1):
        ended = text.add(tokens[:count]) or count == len(tokens)
        if ended:
            text.settle(tokens[:count])
        pieces.append(text.new(ended=ended))
        if ended:
            return pieces, text.answer, count


@settings(max_examples=150)
@given(st.text(max_size=90).filter(lambda text: TOKENIZER(text)["input_ids"]), st.data())
def test_pieces_make_the_text_of_any_tokens(text, data):
    tokens = TOKENIZER(text)["input_ids"]
    tokens = data.draw(st.permutations(tokens)) if data.draw(st.booleans()) else tokens
    pieces, answer, count = grown(tokens)
    assert "".join(pieces) == answer == decode(tokens) and count == len(tokens)


@settings(max_examples=100)
@given(
    st.text("ab \u00e9", min_size=1, max_size=80),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3),
)
def test_stops_end_where_they_do_for_generate(text, stops):
    tokens = TOKENIZER(text)["input_ids"]
    pieces, answer, count = grown(tokens, stops)
    options = GenerationOptions(max_new_tokens=len(tokens), stop_sequences=stops)
    expected = ending(tokens, frozenset(), options, decode)
    assert (count, answer) == (expected.generated_tokens, expected.text)
    assert "".join(pieces) == answer


def test_a_character_comes_whole():
    tokens = TOKENIZER("a\U0001f642b")["input_ids"]
    pieces, _, _ = grown(tokens)
    assert "\U0001f642" in pieces and not any("\ufffd" in piece for piece in pieces)


def test_a_long_answer_is_decoded_by_its_end():
    counts = []

    def counting(ids):
        counts.append(len(ids))
        return decode(ids)

    tokens = TOKENIZER("thank you, great service " * 40)["input_ids"]
    text = GrowingText(counting, StopSequences((), 0, counting))
    pieces = []
    for count in range(1, len(tokens) + 1):
        text.add(tokens[:count])
        pieces.append(text.new(ended=False))
    assert "".join(pieces) == decode(tokens)
    assert sum(counts) < 60 * len(tokens) + len(tokens) ** 2 / 20


def test_a_decoder_that_changes_its_beginning_is_asked_for_the_whole():
    """As of tokenizers that clean up a text: what the last tokens give is then no end of the whole."""

    def counted(ids):
        return f"{len(ids)}:{' '.join(map(str, ids))}"

    text, tokens = GrowingText(counted, StopSequences((), 0, counted)), list(range(200))
    for count in range(1, len(tokens) + 1):
        text.add(tokens[:count])
        assert text.answer == counted(tokens[:count])
