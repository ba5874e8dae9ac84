"""What asks for nothing is taken from clients; what asks for something that is not served is refused by name."""

import typing

import openai
import pytest
from openai.types import CompletionCreateParams, EmbeddingCreateParams
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionMessage,
    ChatCompletionStreamOptionsParam,
)
from openai.types.chat import (
    CompletionCreateParams as ChatCreateParams,
)

from oracles.slow import only
from softprompt.server.unserved import OF_MESSAGE, OF_PART, OF_STREAM, PARAMETERS

CHATS, COMPLETIONS, CLASSIFY = "/v1/chat/completions", "/v1/completions", "/v1/classify"
HI = [{"role": "user", "content": "hi"}]
BODIES = {
    COMPLETIONS: {"model": "writer", "prompt": "hi", "max_tokens": 1},
    CHATS: {"model": "writer", "messages": HI, "max_tokens": 1},
    CLASSIFY: {"model": "complaints", "input": "hi"},
}


def names_of(*kinds):
    found = set()
    for kind in kinds:
        for each in typing.get_args(kind) or (kind,):
            found |= set(typing.get_type_hints(each))
    return found


OPENAI = names_of(CompletionCreateParams, ChatCreateParams, EmbeddingCreateParams)
REQUIRED = {COMPLETIONS: {"model", "prompt"}, CHATS: {"model", "messages"}, CLASSIFY: {"model", "input"}}
ASKING = {
    "audio": {"voice": "alloy", "format": "wav"},
    "best_of": 2,
    "dimensions": 8,
    "encoding_format": "base64",
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 3},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "suffix": "x",
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "verbosity": "low",
    "web_search_options": {},
    "add_generation_prompt": False,
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "cache_salt": "x",
    "chat_template": "x",
    "chat_template_content_format": "openai",
    "chat_template_kwargs": {"enable_thinking": False},
    "continue_final_message": True,
    "detokenize": False,
    "documents": [{"text": "x"}],
    "early_stopping": True,
    "guided_choice": ["a"],
    "guided_decoding_backend": "x",
    "guided_grammar": "x",
    "guided_json": {},
    "guided_regex": "x",
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "kv_transfer_params": {"x": 1},
    "length_penalty": 2.0,
    "logits_processors": ["x"],
    "mm_processor_kwargs": {"x": 1},
    "priority": 3,
    "prompt_embeds": "AAAA",
    "prompt_logprobs": 0,
    "request_id": "x",
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    "stop_token_ids": [3],
    "structured_outputs": {"json": {}},
    "truncate_prompt_tokens": 4,
    "use_beam_search": True,
    "vllm_xargs": {"x": 1},
}
"""A value of each name that asks for what is not served."""
FORMS = {"response_format", "guided_choice", "guided_regex", "guided_json", "structured_outputs"}
"""Of an answer that is generated."""
SERVED_BY_SOME = {"n", "stream", "echo"}
ANY = [name for name, values in PARAMETERS.items() if values is None]


@pytest.fixture(scope="module", name="ask")
def asked(chat_server):
    with chat_server.client() as client:
        yield lambda path, more: client.post(path, json={**BODIES[path], **more})


@pytest.mark.parametrize("path", list(BODIES))
def test_null_of_every_known_name_is_taken(ask, path):
    known = OPENAI | set(PARAMETERS)
    assert len(known) > 70
    alone = ask(path, {"temperature": 0} if path != CLASSIFY else {}).json()
    nulls = dict.fromkeys(known - REQUIRED[path] - {"max_tokens", "temperature"})
    found = ask(path, nulls if path == CLASSIFY else {**nulls, "temperature": 0})
    assert found.status_code == 200, found.text
    changing = {"id", "created"}
    of = [{k: v for k, v in each.items() if k not in changing} for each in (found.json(), alone)]
    assert without_seed(of[0]) == without_seed(of[1])


def without_seed(answer):
    for choice in answer.get("choices", ()):
        choice.pop("seed")
    return answer


@pytest.mark.parametrize("path", list(BODIES))
def test_null_of_an_unknown_name_or_a_required_one_is_refused(ask, path):
    found = ask(path, {"temprature": None})
    assert found.status_code == 400
    for name in REQUIRED[path]:
        found = ask(path, {name: None})
        assert found.status_code == 400, name
        assert name in found.json()["error"]["message"]


@pytest.mark.parametrize("path", only(["/v1/completions", "/v1/classify"], BODIES))
def test_every_neutral_value_is_taken(ask, path):
    for name, values in PARAMETERS.items():
        by_the_template = name == "add_special_tokens" and path == CHATS
        for value in (False,) if by_the_template else values or ():
            found = ask(path, {name: value})
            assert found.status_code == 200, f"{name}={value}: {found.text}"
    for name in ANY:
        found = ask(path, {name: {"any": 1}})
        assert found.status_code == 200, found.text


@pytest.mark.parametrize("path", list(BODIES))
def test_what_is_not_served_is_refused_by_name(ask, path):
    assert set(ASKING) == set(PARAMETERS) - set(ANY) - SERVED_BY_SOME - {"add_special_tokens"}
    for name, value in ASKING.items():
        if path != CLASSIFY and name in FORMS:
            continue
        found = ask(path, {name: value})
        assert found.status_code == 400, name
        error = found.json()["error"]
        assert error["param"] == name
        assert error["message"].startswith(f"{name} is not served; ")
        assert error["type"] == "invalid_request_error"


def test_true_is_not_one(ask):
    assert ask(CHATS, {"best_of": True}).status_code == 400
    assert ask(CHATS, {"skip_special_tokens": 1}).status_code == 400
    assert ask(CHATS, {"best_of": 1.0}).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_every_parameter_of_openai_is_served_or_listed(path):
    from softprompt.server.chat import ChatBody
    from softprompt.server.completions import CompletionBody

    body = {COMPLETIONS: CompletionBody, CHATS: ChatBody}[path]
    own = names_of({COMPLETIONS: CompletionCreateParams, CHATS: ChatCreateParams}[path])
    assert own - set(body.model_fields) <= set(PARAMETERS)


def test_every_part_of_an_echoed_message_is_served_or_listed():
    own = set(ChatCompletionMessage.model_fields) | names_of(ChatCompletionAssistantMessageParam)
    assert own - {"role", "content", "name"} <= set(OF_MESSAGE)
    assert names_of(ChatCompletionContentPartTextParam) - {"type", "text"} <= set(OF_PART)
    assert names_of(ChatCompletionStreamOptionsParam) - {"include_usage"} <= set(OF_STREAM)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("temprature", 1, "temperature"),
        ("response_fromat", {"type": "text"}, "response_format"),
        ("paralel_tool_calls", True, "parallel_tool_calls"),
        ("skip_special_token", True, "skip_special_tokens"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(ask, name, value, hint):
    error = ask(CHATS, {name: value}).json()["error"]
    assert error["message"] == f"{name} is not known here (did you mean {hint!r}?); leave it out"
    assert error["param"] == name


@pytest.mark.parametrize("name", list(OF_MESSAGE))
def test_parts_of_a_message(ask, name):
    for value in (None, *(OF_MESSAGE[name] or ())):
        echoed = {"role": "assistant", "content": "hello", name: value}
        assert ask(CHATS, {"messages": [*HI, echoed, *HI]}).status_code == 200
    echoed = {"role": "assistant", "content": "hello", name: {"asks": "for something"}}
    error = ask(CHATS, {"messages": [*HI, echoed]}).json()["error"]
    assert error["message"].startswith(f"messages[1].{name} is not served; ")
    assert error["param"] == "messages"


def test_parts_of_a_content_and_of_a_stream(ask):
    part = {"type": "text", "text": "hi", "annotations": [], "cache_control": {"type": "ephemeral"}}
    found = ask(CHATS, {"messages": [{"role": "user", "content": [part]}], "temperature": 0})
    assert found.status_code == 200
    plain = ask(CHATS, {"temperature": 0})
    assert found.json()["choices"][0]["message"] == plain.json()["choices"][0]["message"]
    for name in OF_STREAM:
        options = {"include_usage": None, name: False}
        assert ask(CHATS, {"stream": True, "stream_options": options}).status_code == 200
        found = ask(CHATS, {"stream": True, "stream_options": {name: True}})
        assert found.json()["error"]["message"] == f"stream_options.{name} is not served; leave it out"


def test_the_openai_client_with_its_defaults_written_out(chat_server):
    ai = chat_server.openai()
    whole = ai.chat.completions.create(
        model="writer",
        messages=HI,
        max_tokens=3,
        max_completion_tokens=3,
        temperature=0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        store=False,
        metadata={"session": "7"},
        user="u",
        seed=1,
        n=1,
        presence_penalty=0,
        frequency_penalty=0,
        logprobs=False,
        top_logprobs=0,
        service_tier="auto",
        stream_options=None,
        modalities=["text"],
        verbosity="medium",
        extra_body={"top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False, "min_tokens": 0},
    )
    plain = ai.chat.completions.create(model="writer", messages=HI, max_tokens=3, temperature=0)
    assert whole.choices[0].message == plain.choices[0].message
    # An answer goes back as it came.
    echoed = plain.choices[0].message.model_dump()
    assert "refusal" in echoed
    assert "tool_calls" in echoed
    again = ai.chat.completions.create(model="writer", messages=[*HI, echoed, *HI], max_tokens=3, temperature=0)
    bare = [*HI, {"role": "assistant", "content": echoed["content"]}, *HI]
    same = ai.chat.completions.create(model="writer", messages=bare, max_tokens=3, temperature=0)
    assert again.choices[0].message == same.choices[0].message
    assert again.usage == same.usage
    with pytest.raises(openai.BadRequestError, match="tools is not served; describe them in a message") as raised:
        ai.chat.completions.create(model="writer", messages=HI, tools=ASKING["tools"])
    assert raised.value.param == "tools"


def test_completions_with_their_defaults_written_out(chat_server):
    ai = chat_server.openai()
    plain = ai.completions.create(model="writer", prompt="hi", max_tokens=3, temperature=0)
    whole = ai.completions.create(
        model="writer",
        prompt="hi",
        max_tokens=3,
        temperature=0,
        best_of=1,
        echo=False,
        logit_bias={"5": 0},
        suffix=None,
        stop=[],
        stream_options=None,
        extra_body={"logprobs": False, "skip_special_tokens": True, "stop_token_ids": []},
    )
    assert [whole.choices[0].text, whole.choices[0].logprobs] == [plain.choices[0].text, None]
