from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.solo import ending as reference
from softprompt.generation import GenerationOptions, Request, Ticket
from softprompt.generation.answer import AnswerRules, Job, StopSequences
from softprompt.generation.fallback_runner import StopTexts

EOS = 0


def decode(ids):
    """Each id is one byte of UTF-8; EOS is special and gives nothing."""
    return bytes(i for i in ids if i != EOS).decode("utf-8", errors="replace")


def stops(*texts, least=0):
    return StopSequences(texts, least, decode)


def ending(text, *texts, least=0, **settings):
    """The answer that takes a row of new tokens one by one, up to its end."""
    ids = list(text.encode()) if isinstance(text, str) else text
    settings = {"max_new_tokens": max(1, len(ids)), **settings}
    options = GenerationOptions(stop_sequences=texts, min_new_tokens=least, **settings)
    rules = AnswerRules(decode, frozenset({EOS}), True, offline=True)
    ticket = Ticket(Request((9,), options=options), lambda: None)
    job = Job.of(ticket, rules)
    for token in ids:
        job.answers[0].add(token)
        if job.answers[0].ended_by is not None:
            break
    job.close()
    (found,) = ticket.result()
    slow = reference(ids, rules.eos_ids, options, decode)
    assert (found.text, len(found.tokens)) == (slow.text, slow.generated_tokens)
    assert found.ended_by == slow.finish_reason
    return found


def test_an_end_token_ends_and_is_counted_and_what_follows_is_padding():
    found = ending([97, 98, EOS, EOS, EOS])
    assert (found.tokens, found.ended_by, found.text) == ((97, 98, EOS), "eos_token", "ab")


def test_the_token_limit_is_told_from_the_time_limit():
    assert ending("abc", max_new_tokens=3, max_time=9.0).ended_by == "max_tokens"
    assert ending("ab", max_new_tokens=3, max_time=9.0).ended_by == "time_limit"
    assert ending("abc", max_new_tokens=3).ended_by == "max_tokens"


def test_a_stop_sequence_ends_the_row_and_is_counted_but_not_shown():
    found = ending("one. two. three", ". ")
    assert found.ended_by == "stop_sequence"
    assert decode(found.tokens) == "one. "
    assert found.text == "one"


def test_the_first_of_several_stop_sequences_ends():
    found = ending("a;b,c", ",", ";")
    assert found.text == "a"


def test_a_stop_sequence_completed_by_the_last_token_comes_before_the_token_limit():
    assert ending("ab.", ".", max_new_tokens=3).ended_by == "stop_sequence"


def test_an_end_token_after_no_stop_sequence():
    assert ending([97, EOS, 46], ".").ended_by == "eos_token"


def test_min_new_tokens_passes_over_earlier_stop_sequences():
    found = ending("a.b.c.", ".", least=4)
    assert decode(found.tokens) == "a.b."
    assert found.text == "a.b"


def test_a_stop_sequence_of_several_bytes_is_found_when_its_last_byte_comes():
    assert stops("é").completed_by_last(list("né".encode())[:-1]) is None
    found = ending("né!", "é")
    assert (len(found.tokens), found.text) == (3, "n")


def test_the_criterion_sees_new_tokens_only():
    watch = StopTexts(stops("."))
    before = torch.tensor([[46, 46, 97], [46, 46, 46]])
    assert watch(before, None).tolist() == [False, True]
    after = torch.cat([before, torch.tensor([[46], [98]])], dim=1)
    assert watch(after, None).tolist() == [True, False]


@settings(deadline=None)
@given(st.text(alphabet="ab.", max_size=12), st.sampled_from([".", "ab", "b.a"]))
def test_the_end_found_afterwards_is_where_the_criterion_stopped(text, stop):
    ids = list(text.encode())
    rule = stops(stop)
    stopped = next((n for n in range(1, len(ids) + 1) if rule.completed_by_last(ids[:n]) is not None), None)
    if not ids:
        return
    found = ending(text, stop)
    assert (found.ended_by == "stop_sequence") == (stopped is not None)
    if stopped is not None:
        assert len(found.tokens) == stopped
        assert decode(ids[:stopped])[len(found.text) :] == stop
        assert text.index(stop) == len(found.text)
