"""The real ``openai`` client against a real server."""

import openai
import pytest

from softprompt import load
from softprompt.engine import EngineRow, PlainEngine

TEXT = "Where is my parcel, it is two weeks late"


@pytest.fixture(scope="module")
def ai(server):
    return server.openai()


@pytest.fixture(scope="module")
def tuned(shared_prompts, base):
    """The prompts as the library has them, over the model that is served."""
    return {
        name: load(shared_prompts / name, base.model, tokenizer=base.tokenizer)
        for name in ("complaints", "writer", "pairs")
    }


def test_models(ai, base):
    found = {model.id: model for model in ai.models.list()}
    assert list(found) == ["demo", "complaints", "pairs", "plain-peft", "writer"]
    assert found["demo"].parent is None
    assert found["complaints"].parent == "demo"
    assert found["complaints"].labels == ["complaint", "no complaint"]
    assert found["complaints"].engine == "forest"
    assert found["complaints"].virtual_tokens == 4
    assert ai.models.retrieve("writer").id == "writer"
    with pytest.raises(openai.NotFoundError, match="no prompt 'nope'"):
        ai.models.retrieve("nope")


@pytest.mark.parametrize("name", ["complaints", "writer"])
def test_a_completion_is_the_librarys(ai, tuned, name):
    (alone,) = tuned[name].generate([TEXT], max_new_tokens=9)
    found = ai.completions.create(model=name, prompt=TEXT, max_tokens=9, temperature=0)
    (choice,) = found.choices
    assert choice.text == alone.text
    assert choice.finish_reason == {"max_tokens": "length", "eos_token": "stop"}[alone.finish_reason]
    assert found.usage.prompt_tokens == alone.input_token_count
    assert found.usage.completion_tokens == alone.generated_tokens
    assert found.usage.virtual_tokens == {"complaints": 4, "writer": 3}[name]
    assert found.object == "text_completion"
    assert found.model == name


def test_a_stream_is_the_same_text(ai):
    whole = ai.completions.create(model="writer", prompt=TEXT, max_tokens=12, temperature=0)
    chunks = list(
        ai.completions.create(
            model="writer",
            prompt=TEXT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert ends == [None] * (len(ends) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_and_several_answers(ai, tuned):
    texts = [TEXT, "Thank you very much", "Hello"]
    alone = [each.text for each in tuned["writer"].generate(texts, max_new_tokens=6)]
    found = ai.completions.create(model="writer", prompt=texts, max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in found.choices] == list(range(6))
    assert [choice.text for choice in found.choices] == [text for text in alone for _ in range(2)]


def test_a_seed_repeats_and_answers_differ(ai):
    ask = {"model": "writer", "prompt": TEXT, "max_tokens": 12, "temperature": 1.5, "n": 3}
    first = ai.completions.create(**ask, seed=11)
    again = ai.completions.create(**ask, seed=11)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    drawn = ai.completions.create(model="writer", prompt=TEXT, max_tokens=12)
    seed = drawn.choices[0].seed
    same = ai.completions.create(model="writer", prompt=TEXT, max_tokens=12, seed=seed)
    assert same.choices[0].text == drawn.choices[0].text


def test_stop_ends_and_is_cut(ai):
    whole = ai.completions.create(model="writer", prompt=TEXT, max_tokens=12, temperature=0)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:3]
    found = ai.completions.create(
        model="writer", prompt=TEXT, max_tokens=12, temperature=0, stop=[stop, "never there"]
    )
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    streamed = ai.completions.create(
        model="writer", prompt=TEXT, max_tokens=12, temperature=0, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text


def test_token_ids_are_taken_as_they_are(ai, tuned, base):
    (source,), _ = tuned["writer"].sources([TEXT])
    by_text = ai.completions.create(model="writer", prompt=TEXT, max_tokens=8, temperature=0)
    by_ids = ai.completions.create(model="writer", prompt=list(source), max_tokens=8, temperature=0)
    both = ai.completions.create(
        model="writer", prompt=[list(source), list(source[:3])], max_tokens=8, temperature=0
    )
    assert by_ids.choices[0].text.strip() == by_text.choices[0].text.strip()
    assert both.choices[0].text == by_ids.choices[0].text
    assert both.usage.prompt_tokens == len(source) + 3


def test_raw_leaves_the_template_out(ai, tuned, base):
    text = "Text : hello Label :"
    with_template = ai.completions.create(model="complaints", prompt="hello", max_tokens=6, temperature=0)
    raw = ai.completions.create(
        model="complaints", prompt=text, max_tokens=6, temperature=0, extra_body={"raw": True}
    )
    assert raw.choices[0].text.strip() == with_template.choices[0].text
    assert raw.usage == with_template.usage


def test_fields_of_a_template(ai, tuned):
    fields = {"first": "one", "second": "two"}
    (alone,) = tuned["pairs"].generate([fields], max_new_tokens=5)
    found = ai.completions.create(
        model="pairs", prompt=None, max_tokens=5, temperature=0, extra_body={"fields": fields}
    )
    assert found.choices[0].text == alone.text
    with pytest.raises(openai.BadRequestError, match="several fields, so one text is not enough; send fields"):
        ai.completions.create(model="pairs", prompt="one")


def test_log_probabilities(ai, tuned, base, server):
    (source,), _ = tuned["writer"].sources([TEXT])
    found = ai.completions.create(model="writer", prompt=TEXT, max_tokens=5, temperature=0, logprobs=2).choices[0]
    tokens = base.tokenizer.convert_tokens_to_ids
    assert tokens is not None
    generated = server.service.batcher.submit(request_of(server, "writer", TEXT, tokens=5)).result(30)[0]
    row = EngineRow(source, generated.tokens, tuned["writer"].prompt())
    expected = PlainEngine(base).target_log_probs([row])
    assert found.logprobs.token_logprobs == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert all(
        values[token] == value == max(values.values())
        for token, value, values in zip(
            found.logprobs.tokens,
            found.logprobs.token_logprobs,
            found.logprobs.top_logprobs,
            strict=True,
        )
    )
    assert len(found.logprobs.tokens) == len(generated.tokens)


def request_of(server, name, text, tokens):
    from softprompt.generation import GenerationOptions, Request

    served = server.service.registry.get(name)
    given = served.of_fields(text)
    options = GenerationOptions(max_new_tokens=tokens)
    return Request(given.ids, served.prompt, given.at, options, decode=given.decode)


def test_echo_with_log_probabilities(ai, tuned, base):
    (source,), _ = tuned["writer"].sources([TEXT])
    prompt = tuned["writer"].prompt()
    rows = [EngineRow(source[:i], (source[i],), prompt) for i in range(1, len(source))]
    expected = PlainEngine(base).target_log_probs(rows)
    for tokens in (0, 3):
        found = ai.completions.create(
            model="writer", prompt=TEXT, max_tokens=tokens, temperature=0, logprobs=1, echo=True
        )
        scores = found.choices[0].logprobs
        assert len(scores.tokens) == len(source) + found.usage.completion_tokens
        assert found.usage.completion_tokens == tokens
        assert scores.token_logprobs[0] is None
        assert scores.token_logprobs[1 : len(source)] == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert found.choices[0].text.startswith(TEXT)
        assert "".join(scores.tokens) == found.choices[0].text
        assert scores.text_offset[1] == len(scores.tokens[0])


@pytest.mark.parametrize("most", [4, 0])
def test_echo_in_a_stream(ai, most):
    ask = {
        "model": "writer",
        "prompt": [TEXT, "Hello"],
        "max_tokens": most,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    whole = ai.completions.create(**ask)
    texts, tokens, ends = {0: "", 1: ""}, {0: [], 1: []}, {0: [], 1: []}
    for chunk in ai.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert ends[choice.index] == [choice.finish_reason]
    plain = ai.completions.create(**{**ask, "logprobs": None}, stream=True)
    assert "".join(c.choices[0].text for c in plain if c.choices[0].index == 0) == texts[0]


def test_the_base_alone(ai, tuned, base):
    (source,), _ = tuned["writer"].sources([TEXT])
    ids = base.model.generate(
        input_ids=base.model.dummy_inputs["input_ids"].new_tensor([source]),
        attention_mask=base.model.dummy_inputs["input_ids"].new_ones(1, len(source)),
        max_new_tokens=6,
        do_sample=False,
    )[0, len(source) :]
    found = ai.completions.create(model="demo", prompt=TEXT, max_tokens=6, temperature=0)
    assert found.choices[0].text == base.tokenizer.decode(ids, skip_special_tokens=True)
    assert found.usage.virtual_tokens == 0


def test_chat_needs_a_template(ai):
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        ai.chat.completions.create(model="writer", messages=[{"role": "user", "content": "hi"}])


def test_chat(chat_server, chat_base):
    ai = chat_server.openai()
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "hi"}]
    found = ai.chat.completions.create(
        model="writer",
        messages=messages,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    rendered = chat_base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    same = ai.completions.create(
        model="writer", prompt=rendered, max_tokens=6, temperature=0, extra_body={"raw": True}
    )
    choice = found.choices[0]
    assert choice.message.content == same.choices[0].text
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == found.usage.completion_tokens
    assert choice.logprobs.content[0].top_logprobs[0].token == choice.logprobs.content[0].token
    streamed = ai.chat.completions.create(
        model="writer",
        messages=messages,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-1].usage == found.usage
    with pytest.raises(openai.BadRequestError, match="no tools here"):
        ai.chat.completions.create(model="writer", messages=[{"role": "tool", "content": "x"}])


def test_errors_are_openais(ai):
    with pytest.raises(openai.NotFoundError) as raised:
        ai.completions.create(model="nope", prompt="x")
    assert raised.value.code == "model_not_found"
    assert raised.value.type == "not_found_error"
    with pytest.raises(openai.BadRequestError) as raised:
        ai.completions.create(model="writer", prompt="x", max_tokens=5000)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ai.completions.create(model="writer", prompt="x", temperature=-1)


def test_a_long_input_is_refused_or_cut_when_told(ai):
    long = "word " * 300
    with pytest.raises(openai.BadRequestError, match="truncate_input=true"):
        ai.completions.create(model="complaints", prompt=long)
    found = ai.completions.create(
        model="complaints", prompt=long, max_tokens=2, extra_body={"truncate_input": True}
    )
    assert found.usage.prompt_tokens <= 128
