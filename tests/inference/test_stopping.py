from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.inference import GenerationOptions
from softprompt.inference.stopping import StopAtSequences, StopSequences, find_ending

EOS = 0


def decode(ids):
    """Each id is one byte of UTF-8; EOS is special and gives nothing."""
    return bytes(i for i in ids if i != EOS).decode("utf-8", errors="replace")


def stops(*texts, least=0):
    return StopSequences(texts, least, decode)


def ending(text, *texts, least=0, **settings):
    ids = list(text.encode()) if isinstance(text, str) else text
    options = GenerationOptions(stop_sequences=texts, **settings)
    return find_ending(ids, frozenset({EOS}), stops(*texts, least=least), options)


def test_an_end_token_ends_and_is_counted_and_what_follows_is_padding():
    found = ending([97, 98, EOS, EOS, EOS])
    assert (found.tokens, found.reason, found.text_end) == ((97, 98, EOS), "eos_token", None)


def test_the_token_limit_is_told_from_the_time_limit():
    assert ending("abc", max_new_tokens=3, max_time=9.0).reason == "max_tokens"
    assert ending("ab", max_new_tokens=3, max_time=9.0).reason == "time_limit"
    assert ending("abc", max_new_tokens=3).reason == "max_tokens"


def test_a_stop_sequence_ends_the_row_and_is_counted_but_not_shown():
    found = ending("one. two. three", ". ")
    assert found.reason == "stop_sequence"
    assert decode(found.tokens) == "one. "
    assert decode(found.tokens)[: found.text_end] == "one"


def test_the_first_of_several_stop_sequences_ends():
    found = ending("a;b,c", ",", ";")
    assert decode(found.tokens)[: found.text_end] == "a"


def test_a_stop_sequence_completed_by_the_last_token_comes_before_the_token_limit():
    assert ending("ab.", ".", max_new_tokens=3).reason == "stop_sequence"


def test_an_end_token_after_no_stop_sequence():
    assert ending([97, EOS, 46], ".").reason == "eos_token"


def test_min_new_tokens_passes_over_earlier_stop_sequences():
    found = ending("a.b.c.", ".", least=4)
    assert decode(found.tokens) == "a.b."
    assert decode(found.tokens)[: found.text_end] == "a.b"


def test_a_stop_sequence_of_several_bytes_is_found_when_its_last_byte_comes():
    assert stops("é").completed_by_last(list("né".encode())[:-1]) is None
    found = ending("né!", "é")
    assert (len(found.tokens), found.text_end) == (3, 1)


def test_the_criterion_sees_new_tokens_only():
    watch = StopAtSequences(stops("."))
    before = torch.tensor([[46, 46, 97], [46, 46, 46]])
    assert watch(before, None).tolist() == [False, True]
    after = torch.cat([before, torch.tensor([[46], [98]])], dim=1)
    assert watch(after, None).tolist() == [True, False]


@settings(deadline=None)
@given(st.text(alphabet="ab.", max_size=12), st.sampled_from([".", "ab", "b.a"]))
def test_the_end_found_afterwards_is_where_the_criterion_stopped(text, stop):
    ids = list(text.encode())
    rule = stops(stop)
    stopped = next(
        (n for n in range(1, len(ids) + 1) if rule.completed_by_last(ids[:n]) is not None), None
    )
    first = rule.first(ids)
    assert (first and first[0]) == stopped
    if stopped is not None:
        assert decode(ids[: first[0]])[first[1] :] == stop
        assert text.index(stop) == first[1]
