"""What one request may ask for, and how it ends."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from oracles.served import served
from softprompt.errors import ConfigError, ContextOverflowError, DataError, ServingError
from softprompt.generation import (
    Batcher,
    Bounds,
    Decoder,
    EchoEvent,
    FinishEvent,
    GenerationOptions,
    Request,
    TokenEvent,
)
from softprompt.prompts import Prompt

IDS = (1, 40, 41, 42, 43, 44, 45, 46, 47)
KINDS = ("plain", "suffix", "after_bos", "prefix")


@pytest.fixture(scope="module", params=["llama", "bloom"])
def base(request):
    kinds = KINDS if request.param == "llama" else KINDS[:3]
    return served(request.param, kinds=kinds)


@pytest.fixture(scope="module")
def batcher(base):
    batcher = Batcher(base.base, Bounds(max_batch_rows=8, max_step_tokens=8))
    yield batcher
    batcher.stop()


def logits_of(base, request):
    """Logits ``[T - 1, V]`` before every input token but the first, each from a pass of its own."""
    found = []
    value = None if request.prompt is None else request.prompt.input
    embed = base.model.get_input_embeddings()
    for end in range(1, len(request.ids)):
        rows = embed(torch.tensor(request.ids[:end]))
        if value is not None and request.at <= end:
            rows = torch.cat([rows[: request.at], value, rows[request.at :]])
        found.append(base.model(inputs_embeds=rows.unsqueeze(0)).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", [None, "plain", "suffix", "after_bos"])
@pytest.mark.parametrize("generate", [True, False])
def test_echo_scores_the_input(base, batcher, name, generate):
    options = GenerationOptions(max_new_tokens=1)
    request = base.request(name, IDS, options=options, logprobs=3, echo=True, generate=generate)
    batcher.submit(request).result(30)
    events = list(batcher.submit(request))  # the second time the prompt is resident
    echo = events[0]
    assert isinstance(echo, EchoEvent) and echo.token_ids == IDS
    assert echo.logprobs[0] is None and echo.top_logprobs[0] == ()
    logs = logits_of(base, request).log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(logs, IDS[1:], strict=True)]
    assert list(echo.logprobs[1:]) == pytest.approx(expected, abs=1e-4)
    for row, top in zip(logs, echo.top_logprobs[1:], strict=True):
        values, tokens = row.topk(3)
        assert [token for token, _ in top] == tokens.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
    assert sum(isinstance(event, FinishEvent) for event in events) == int(generate)


def test_several_answers_draw_with_seeds_of_their_own(base, batcher):
    for name in base.prompts:
        options = [GenerationOptions(max_new_tokens=8, decoding_method="SAMPLING", seed=7 + i) for i in range(3)]
        ends = batcher.submit(base.request(name, IDS, options=options[0], n=3)).result(30)
        assert [end.index for end in ends] == [0, 1, 2] and [end.seed for end in ends] == [7, 8, 9]
        assert [end.text for end in ends] == [base.alone(name, IDS, o).text for o in options]


def test_unseeded_answers_tell_a_seed_that_repeats_them(base, batcher):
    options = GenerationOptions(max_new_tokens=8, decoding_method="SAMPLING")
    for end in batcher.submit(base.request("plain", IDS, options=options, n=2)).result(30):
        again = GenerationOptions(max_new_tokens=8, decoding_method="SAMPLING", seed=end.seed)
        assert base.alone("plain", IDS, again).text == end.text


def test_stop_sequences_are_held_back_and_cut(base, batcher):
    plain = base.alone("plain", IDS, GenerationOptions(max_new_tokens=14)).text
    whole = [c for c in plain if c != "\ufffd"]
    assert len(whole) > 2
    for stop in {whole[1], whole[-1], "never there", plain[1:4]}:
        options = GenerationOptions(max_new_tokens=14, stop_sequences=[stop, "also never"])
        ticket = batcher.submit(base.request("plain", IDS, options=options))
        alone = base.alone("plain", IDS, options)
        (end,) = ticket.result(30)
        assert (end.text, end.ended_by) == (alone.text, alone.finish_reason)
        pieces = [event.text for event in ticket if isinstance(event, TokenEvent)]
        assert "".join(pieces) == end.text
        assert not any(stop in "".join(pieces[:i]) for i in range(len(pieces)))


def test_top_logprobs_of_answers(base, batcher):
    options = GenerationOptions(max_new_tokens=4)
    ticket = batcher.submit(base.request("plain", IDS, options=options, logprobs=2))
    for event in ticket:
        if isinstance(event, TokenEvent):
            assert len(event.top_logprobs) == 2
            assert event.top_logprobs[0] == (event.token_id, pytest.approx(event.logprob))


def test_time_runs_out(base, batcher):
    options = GenerationOptions(max_new_tokens=30, max_time=1e-6)
    (end,) = batcher.submit(base.request("plain", IDS, options=options)).result(30)
    assert (end.reason, end.ended_by) == ("time", "time_limit")
    assert len(end.tokens) <= 1


def test_input_text_is_kept_when_asked(base, batcher):
    options = GenerationOptions(max_new_tokens=5, preserve_input_text=True)
    (end,) = batcher.submit(base.request("plain", IDS, options=options)).result(30)
    assert end.text == base.alone("plain", IDS, options).text


def test_awaiting_and_cancelling_from_a_loop(base, batcher):
    options = GenerationOptions(max_new_tokens=8)

    async def run():
        tickets = [batcher.submit(base.request("plain", IDS, options=options)) for _ in range(3)]
        tickets[1].cancel()
        return [await ticket for ticket in tickets]

    first, second, third = asyncio.run(run())
    assert first == third and first[0].text == base.alone("plain", IDS, options).text
    assert second[0].reason in ("cancelled", "length", "stop")


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (lambda b: Request((1, 999_999)), DataError, "999,999"),
        (lambda b: Request((1, -1)), DataError, "-1"),
        (lambda b: Request(()), DataError, "no tokens|empty input"),
        (
            lambda b: Request(tuple(range(4, 64)), options=GenerationOptions(max_new_tokens=64)),
            ContextOverflowError,
            "exceed the model's 64",
        ),
        (lambda b: Request(IDS, Prompt(torch.zeros(3, 7))), ConfigError, r"\[3, 7\]"),
        (
            lambda b: Request(IDS, Prompt(torch.full((3, 32), torch.nan))),
            ConfigError,
            "finite",
        ),
        (
            lambda b: Request(IDS, Prompt(decoder=torch.zeros(3, 32))),
            ConfigError,
            "virtual tokens for a decoder beside an encoder, but .* has one input; give them as its input",
        ),
        (
            lambda b: Request(IDS, Prompt(prefix=torch.zeros(1, 2, 1, 3, 8))),
            ConfigError,
            r"prompt has shape \[1, 2, 1, 3, 8\], .* takes \[\d+, 2, \d+, P, \d+\]; use the base it was made for",
        ),
        (lambda b: Request(IDS, Prompt(torch.zeros(3, 32)), at=99), DataError, "99"),
        (lambda b: Request(IDS, n=9), ServingError, "n = 9"),
        (lambda b: Request(IDS, options=GenerationOptions(num_beams=2)), ConfigError, "num_beams"),
    ],
)
def test_what_could_never_run_is_refused_at_once(base, batcher, request_, error, match):
    if error is ContextOverflowError and base.model.config.model_type == "bloom":
        return  # its positions have no end
    with pytest.raises(error, match=match):
        batcher.submit(request_(base))


def test_beams_give_one_answer_each(base):
    beams = GenerationOptions(max_new_tokens=2, num_beams=2)
    for several in ({"n": 2}, {"echo": True, "logprobs": 1}):
        with pytest.raises(ConfigError, match="beam search gives one answer, and no log-probabilities"):
            Decoder(base.base).run([Request(IDS, options=beams, **several)])


def test_a_failing_request_fails_alone(base, batcher):
    def broken(ids):
        raise ValueError("no text today")

    options = GenerationOptions(max_new_tokens=6)
    good = [batcher.submit(base.request("plain", IDS, options=options)) for _ in range(2)]
    bad = batcher.submit(Request(IDS, options=options, decode=broken))
    huge = Prompt(torch.full((3, 32), 3e38))
    endless = batcher.submit(Request(IDS, huge, options=options))
    good += [batcher.submit(base.request("suffix", IDS, options=options)) for _ in range(2)]
    with pytest.raises(ValueError, match="no text today"):
        bad.result(30)
    with pytest.raises(ValueError, match="no text today"):
        list(bad)
    try:
        endless.result(30)
    except ServingError as error:
        assert "not finite" in str(error)
    for ticket, name in zip(good, ["plain", "plain", "suffix", "suffix"], strict=True):
        assert ticket.result(30)[0].text == base.alone(name, IDS, options).text
    assert batcher.healthy


def test_a_request_checks_itself():
    with pytest.raises(ConfigError, match="n expects"):
        Request(IDS, n=0)
    with pytest.raises(ConfigError, match="logprobs"):
        Request(IDS, logprobs=21)
    with pytest.raises(ConfigError, match="ask for one"):
        Request(IDS, generate=False)


def test_waiting_for_a_result_has_an_end(base, batcher):

    with base.base.lock:  # nothing runs meanwhile
        ticket = batcher.submit(base.request("plain", IDS))
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            ticket.result(0.05)
        assert time.monotonic() - started < 5
    assert ticket.result(30)
