"""From what a client sent to what the batcher is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.errors import ConfigError, DataError
from softprompt.inference import GenerationOptions, Input
from softprompt.inference.continuous.request import Request
from softprompt.server.served import Served, chat_input
from softprompt.server.shapes import ChatBody, ClassifyBody, CompletionBody, Generation

_COLDEST = 1e-3
"""Below it the division by the temperature leaves what float32 can hold."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One call.

    Attributes:
        served: The prompt it names, in the version that answers.
        inputs: What stands before the answers.
        requests: What the batcher is asked, one for each input.
    """

    served: Served
    inputs: tuple[Input, ...]
    requests: tuple[Request, ...]


def asked_completion(body: CompletionBody, served: Served, seconds: float) -> Asked:
    """Turn a completion's body into requests.

    Raises:
        ConfigError: Settings contradict each other.
        DataError: An input does not suit the prompt.
    """
    if body.max_tokens == 0 and not body.echo:
        raise ConfigError("max_tokens 0 asks for nothing; send echo=true with it, or at least 1")
    inputs = _inputs(body, served)
    generate = body.max_tokens != 0
    scored = bool(body.echo) and body.logprobs is not None
    options = options_of(body, 16 if body.max_tokens is None else body.max_tokens, seconds)
    requests = [
        Request(
            ids=each.ids,
            prompt=served.prompt,
            at=each.at,
            options=options,
            n=body.n or 1,
            logprobs=body.logprobs,
            echo=scored or not generate,
            generate=generate,
            # Behind an echoed input the answer keeps the space that it begins with.
            decode=served.plain.decode if body.echo else each.decode,
        )
        for each in inputs
    ]
    return Asked(served, tuple(inputs), tuple(requests))


def asked_chat(body: ChatBody, served: Served, seconds: float, most: int) -> Asked:
    """Turn a chat's body into a request; ``most`` is how long answers are when nothing is said.

    Raises:
        ConfigError: Settings contradict each other, or there is no chat template for this.
    """
    if body.max_tokens and body.max_completion_tokens:
        raise ConfigError("max_tokens and max_completion_tokens are the same thing; send one")
    if body.top_logprobs is not None and not body.logprobs:
        raise ConfigError("top_logprobs needs logprobs=true")
    given = chat_input(served, [message.plain() for message in body.messages])
    options = options_of(body, body.max_completion_tokens or body.max_tokens or most, seconds)
    request = Request(
        ids=given.ids,
        prompt=served.prompt,
        at=given.at,
        options=options,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        decode=given.decode,
    )
    return Asked(served, (given,), (request,))


def options_of(body: Generation, tokens: int, seconds: float) -> GenerationOptions:
    """Return generation options; at temperature 0 the likeliest token is taken.

    Raises:
        ConfigError: A value is out of range.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    settings: dict[str, Any] = {
        "max_new_tokens": max(1, tokens),
        "min_new_tokens": body.min_tokens or 0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "exponential_decay_length_penalty": _length_penalty(body),
        "max_time": min(body.max_time or seconds, seconds),
        "stop_sequences": tuple(stop),
    }
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature:
        settings |= _sampling(body, temperature)
    return GenerationOptions(**settings)


def _length_penalty(body: Generation) -> tuple[float, float] | None:
    if body.exponential_decay_length_penalty is None:
        return None
    start, factor = body.exponential_decay_length_penalty
    return int(start) if start.is_integer() else start, factor


def _sampling(body: Generation, temperature: float) -> dict[str, Any]:
    if temperature < _COLDEST:
        raise ConfigError(f"temperature is 0 or at least {_COLDEST:g}, got {temperature:g}")
    found: dict[str, Any] = {"decoding_method": "SAMPLING", "seed": body.seed}
    # 1 divides by nothing and keeps all: left out, so that it costs nothing either.
    for name in ("top_p", "typical_p"):
        value = getattr(body, name)
        found[name] = None if value == 1 else value
    found["temperature"] = None if temperature == 1 else temperature
    found["top_k"] = body.top_k if body.top_k and body.top_k > 0 else None
    found["min_p"] = body.min_p or None
    return found


def _inputs(body: CompletionBody, served: Served) -> list[Input]:
    if (body.prompt is None) == (body.fields is None):
        raise DataError("send either prompt, or the template's fields")
    if body.fields is not None:
        if body.raw:
            raise ConfigError("raw takes prompt as it is; leave fields out")
        given = body.fields if isinstance(body.fields, list) else [body.fields]
        return [served.of_fields(each, truncate=body.truncate_input) for each in given]
    prompts: Sequence[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompts[0], int):
        prompts = [prompts]
    return [_input(each, body, served) for each in prompts]


def _input(prompt: str | list[int], body: CompletionBody, served: Served) -> Input:
    if isinstance(prompt, list):
        found = served.of_ids(prompt)
    elif body.raw:
        found = served.of_text(prompt)
    else:
        found = served.of_fields(prompt, truncate=body.truncate_input)
    if not found.ids:
        raise DataError("the text has no tokens, there is nothing to go on from; send some text")
    return found


def texts_of(body: ClassifyBody) -> list[str | dict[str, str | float | int]]:
    """Return the inputs to classify.

    Raises:
        DataError: None, or both kinds, were sent.
    """
    if (body.input is None) == (body.fields is None):
        raise DataError("send either input, or the template's fields")
    if body.fields is not None:
        return list(body.fields) if isinstance(body.fields, list) else [body.fields]
    texts = body.input if isinstance(body.input, list) else [body.input or ""]
    return list(texts)
