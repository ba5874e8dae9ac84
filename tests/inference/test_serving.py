"""The Python face: names in, answers and pieces out."""

from __future__ import annotations

import asyncio
import gc
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from oracles.served import served
from oracles.slow import only
from oracles.tuned import untrained
from softprompt import (
    MultitaskPromptTuningConfig,
    PromptTuningConfig,
    Serving,
    TunedPrompt,
    load,
)
from softprompt.errors import AdapterError, ConfigError, ContextOverflowError, NotServingError, QueueFullError
from softprompt.generation import GenerationOptions, Ticket

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
        base.prompts[name].generate(text, max_new_tokens=8)[0] for name, text in zip(names, TEXTS, strict=True)
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


def test_those_before_a_refused_input_are_cancelled(serving, monkeypatch):
    made, submit = [], serving.batcher.submit

    def refusing(request, **more):
        if len(made) == 2:
            raise ConfigError("no")
        made.append(submit(request, **more))
        return made[-1]

    cancelled = []
    monkeypatch.setattr(serving.batcher, "submit", refusing)
    original = Ticket.cancel
    monkeypatch.setattr(Ticket, "cancel", lambda ticket: (cancelled.append(ticket), original(ticket))[1])
    with pytest.raises(ConfigError):
        serving.generate(TEXTS, "plain", max_new_tokens=40)
    assert cancelled == made


def test_a_stream_that_was_never_begun_is_cancelled(serving, monkeypatch):
    cancelled = []  # kept, so that no second ticket gets the first one's id

    def note(ticket):
        cancelled.append(ticket)

    monkeypatch.setattr(Ticket, "cancel", note)
    for stream in (serving.stream, serving.astream):
        stream(TEXTS[0], "plain", max_new_tokens=1)
        gc.collect()
    assert len({id(ticket) for ticket in cancelled}) == 2


def test_one_text_is_no_set_of_labels(base, serving):
    for classify in (base.prompts["plain"].classify, partial(serving.classify, prompts="plain")):
        with pytest.raises(ConfigError, match="labels expects a list of texts, got the text 'ab'"):
            classify("good", labels="ab")


def test_what_cannot_be_asked_whole_is_cancelled(base, serving, monkeypatch):
    submit, begun = serving.batcher.submit, []
    monkeypatch.setattr(
        serving.batcher,
        "submit",
        lambda *args, **more: begun.append(submit(*args, **more)) or begun[-1],
    )
    with pytest.raises(ContextOverflowError):
        serving.generate([*TEXTS, "good " * 40], "plain", max_new_tokens=30)
    assert len(begun) == len(TEXTS)
    assert all(ticket.is_cancelled for ticket in begun)


def test_labels_that_cannot_be_asked_whole_are_cancelled(serving, monkeypatch):
    begun = []

    def refusing(rows):
        if begun:
            raise QueueFullError("full", 1.0)
        begun.append(Future())
        return begun[-1]

    monkeypatch.setattr(serving._scorer, "submit", refusing)
    with pytest.raises(QueueFullError):
        serving.classify(TEXTS[:2], ["plain", "other"], labels=["a", "b"])
    assert [each.cancelled() for each in begun] == [True]


def test_threads_read_texts_each_in_their_own_way(base):
    plain = base.prompts["plain"]
    mark = plain.tokenizer.eos_token
    marked = TunedPrompt(
        plain.base,
        plain.module,
        plain.config,
        replace(plain.manifest, template=mark + plain.manifest.template),
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


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Saved rows, a saved prefix and a saved multitask prompt of one base."""
    base = served("llama", kinds=("plain", "prefix"))
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=1)
    own = {"labels": None, "task": "generation"}
    tasks = {
        "ask": {**own, "template": "{{input}} ?"},
        "tell": {**own, "template": "{{input}} !"},
    }
    plain = base.prompts["plain"]
    record = replace(plain.whole, tasks=("ask", "tell"), data={"tasks": tasks})
    base.prompts["both"] = untrained(base.base, config, record, seed=2)
    root = tmp_path_factory.mktemp("prompts")
    for name, tuned in base.prompts.items():
        tuned.save(root / name)
    return base, {name: root / name for name in base.prompts}


def test_prompts_of_all_kinds_are_loaded_beside_one_base(mixed):
    base, folders = mixed
    names = ["plain", "both", "prefix", "both"]
    tasks = [None, "tell", None, 0]
    alone = [
        base.prompts[name].generate(text, task_name=task, max_new_tokens=8)[0]
        for name, task, text in zip(names, tasks, TEXTS, strict=True)
    ]
    with load(folders, base.model, tokenizer=base.tokenizer) as serving:
        assert serving.generate(TEXTS, names, task_name=tasks, max_new_tokens=8) == alone
        found = serving.agenerate(TEXTS, names, task_name=tasks, max_new_tokens=8)
        assert asyncio.run(found) == alone
        stream = serving.stream(TEXTS[1], "both", task_name="tell", max_new_tokens=8)
        assert "".join(stream) == alone[1].text
        with pytest.raises(ConfigError, match=r"2 tasks \(ask, tell\); choose one"):
            serving.generate(TEXTS[0], "both")
        with pytest.raises(ConfigError, match="did you mean 'tell'"):
            serving.stream(TEXTS[0], "both", task_name="tel")
        with pytest.raises(ConfigError, match="task_name expects one name, or one for each"):
            serving.generate(TEXTS, names, task_name=["ask"])


def test_a_chosen_task_is_the_one_that_answers(mixed):
    base, _ = mixed
    both = base.prompts["both"]
    with Serving({"it": both.of_task("tell")}) as serving:
        for task in (None, "ask", "tell"):
            (alone,) = both.generate(TEXTS[0], task_name=task or "tell", max_new_tokens=8)
            assert serving.generate(TEXTS[0], "it", task_name=task, max_new_tokens=8) == [alone]


def test_labels_are_scored_as_by_each_prompt_alone(mixed, tmp_path):
    base, folders = mixed
    plain = base.prompts["plain"]
    sets = {"two": ("good", "bad"), "three": ("good", "so so", "bad")}
    own = {
        name: TunedPrompt(plain.base, plain.module, plain.config, replace(plain.whole, labels=labels))
        for name, labels in sets.items()
    }
    for name, tuned in own.items():
        tuned.save(tmp_path / name)
    folders = {**folders, **{name: tmp_path / name for name in own}}
    names = ["three", "two", "three", "two"]
    with load(folders, base.model, tokenizer=base.tokenizer) as serving:
        for normalize in (False, True):
            how = {"normalize": normalize}
            alone = [own[name].classify(text, **how)[0] for name, text in zip(names, TEXTS, strict=True)]
            found = serving.classify(TEXTS, names, **how)
            check_scores(found, alone)
            check_scores(asyncio.run(serving.aclassify(TEXTS, names, **how)), alone)
        names, tasks = ["both", "prefix", "both", "both"], ["ask", None, 1, "ask"]
        alone = [
            base.prompts[name].classify(text, ["yes", "no"], task_name=task)[0]
            for name, task, text in zip(names, tasks, TEXTS, strict=True)
        ]
        found = serving.classify(TEXTS, names, ["yes", "no"], task_name=tasks)
        check_scores(found, alone)
        with pytest.raises(ConfigError, match=r"'prefix' generates free text .* pass labels"):
            serving.classify(TEXTS, ["two", "two", "two", "prefix"])
        with pytest.raises(ConfigError, match="have the same tokens"):
            serving.classify(TEXTS, "two", ["yes", "yes"])
    with pytest.raises(NotServingError):
        serving.classify(TEXTS, "two")


@pytest.mark.parametrize("types", only([["ENCODER", "DECODER"]], [["DECODER"], ["ENCODER", "DECODER"]]))
def test_prompts_before_a_decoder_are_served_as_alone(types):
    base = served("t5", kinds=("plain",)).prompts["plain"]
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, output_model_types=types)
    tuned = untrained(base.base, config, base.whole, seed=4)
    with Serving({"it": tuned}) as serving:
        answers = serving.generate(TEXTS, "it", max_new_tokens=6)
        assert answers == tuned.generate(TEXTS, max_new_tokens=6)
        assert len({each.text for each in answers}) > 1
        check_scores(serving.classify(TEXTS, "it", ["yes", "no"]), tuned.classify(TEXTS, ["yes", "no"]))


def check_scores(found, alone):
    assert [list(each.scores) for each in found] == [list(each.scores) for each in alone]
    for mine, other in zip(found, alone, strict=True):
        assert mine.label == other.label
        assert list(mine.scores.values()) == pytest.approx(list(other.scores.values()), abs=1e-4)
        assert list(mine.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-5)


def test_what_is_refused(base, serving):
    with pytest.raises(AdapterError, match="did you mean 'plain'"):
        serving.generate("good", "plane")
    with pytest.raises(ConfigError, match="one for each of the 4 inputs, got 2"):
        serving.generate(TEXTS, ["plain", "other"])
    with pytest.raises(ConfigError, match="at least one prompt"):
        Serving({})
    with pytest.raises(ConfigError, match="another base model"):
        Serving({"a": base.prompts["plain"], "b": served("gpt2", kinds=("plain",)).prompts["plain"]})
    with pytest.raises(ConfigError, match="num_beams"):
        serving.generate("good", "plain", num_beams=2)
