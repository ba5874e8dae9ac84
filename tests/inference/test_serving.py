"""The Python face: names in, answers and pieces out."""

from __future__ import annotations

import asyncio
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from oracles.served import served
from softprompt import Serving, TunedPrompt
from softprompt.errors import AdapterError, ConfigError
from softprompt.inference.continuous.ticket import Ticket
from softprompt.inference.options import GenerationOptions

TEXTS = ["is it good", "the parcel is late", "bad", "thank you, great"]


@pytest.fixture(scope="module")
def base():
    return served("llama", kinds=("plain", "other", "suffix"))


@pytest.fixture(scope="module")
def serving(base):
    with Serving(base.prompts) as serving:
        yield serving


def test_answers_are_those_of_each_prompt_alone(base, serving):
    names = ["plain", "other", "suffix", "plain"]
    answers = serving.generate(TEXTS, names, max_new_tokens=8)
    alone = [
        base.prompts[name].generate(text, max_new_tokens=8)[0]
        for name, text in zip(names, TEXTS, strict=True)
    ]
    assert answers == alone
    assert asyncio.run(serving.agenerate(TEXTS, names, max_new_tokens=8)) == alone


def test_pieces_make_the_answer(base, serving):
    whole = base.prompts["other"].generate(TEXTS[1], max_new_tokens=12)[0].text
    assert "".join(serving.stream(TEXTS[1], "other", max_new_tokens=12)) == whole
    assert "".join(base.prompts["other"].stream(TEXTS[1], max_new_tokens=12)) == whole

    async def gathered():
        return [piece async for piece in serving.astream(TEXTS[1], "other", max_new_tokens=12)]

    assert "".join(asyncio.run(gathered())) == whole


def test_a_dropped_stream_is_cancelled(serving):
    stream = serving.stream(TEXTS[0], "plain", max_new_tokens=40)
    next(stream)
    stream.close()
    assert serving.generate("good", "plain", max_new_tokens=1)


def test_a_stream_that_was_never_begun_is_cancelled(serving, monkeypatch):
    cancelled = set()
    monkeypatch.setattr(Ticket, "cancel", lambda ticket: cancelled.add(id(ticket)))
    for stream in (serving.stream, serving.astream):
        stream(TEXTS[0], "plain", max_new_tokens=1)
        gc.collect()
    assert len(cancelled) == 2


def test_threads_read_texts_each_in_their_own_way(base):
    plain = base.prompts["plain"]
    mark = plain.tokenizer.eos_token
    marked = TunedPrompt(
        plain.model,
        plain.tokenizer,
        replace(plain.manifest, template=mark + plain.manifest.template),
        plain.adapter,
    )
    cases = [(plain, f"is {mark} it"), (marked, "is it")]
    expected = [tuned.sources([text]) for tuned, text in cases]

    def read(number):
        tuned, text = cases[number % 2]
        return all(tuned.sources([text]) == expected[number % 2] for _ in range(300))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(read, range(4)))
    finally:
        sys.setswitchinterval(before)


def test_a_replaced_prompt_affects_later_requests_only(base):
    options = GenerationOptions(max_new_tokens=20)
    before = base.prompts["plain"].generate(TEXTS[0], options=options)[0].text
    other = base.prompts["other"].generate(TEXTS[0], options=options)[0].text
    assert before != other
    with Serving({"it": base.prompts["plain"]}) as serving:
        first = serving.submit(TEXTS[0], "it", options)
        serving.put("it", base.prompts["other"])
        second = serving.submit(TEXTS[0], "it", options)
        assert first.result(30)[0].text == before
        assert second.result(30)[0].text == other


def test_what_is_refused(base, serving):
    with pytest.raises(AdapterError, match="did you mean 'plain'"):
        serving.generate("good", "plane")
    with pytest.raises(ConfigError, match="one for each of the 4 inputs, got 2"):
        serving.generate(TEXTS, ["plain", "other"])
    with pytest.raises(ConfigError, match="at least one prompt"):
        Serving({})
    with pytest.raises(ConfigError, match="another base model"):
        Serving(
            {"a": base.prompts["plain"], "b": served("gpt2", kinds=("plain",)).prompts["plain"]}
        )
    with pytest.raises(ConfigError, match="num_beams"):
        serving.generate("good", "plain", num_beams=2)
