"""OpenAI's protocol: the parameters of requests, as generation options, and answers gathered from events.

Names and ranges are OpenAI's and vLLM's; an unknown name raises, naming the nearest known one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from softprompt.errors import ConfigError, broken
from softprompt.generation import (
    EchoEvent,
    Event,
    FinishEvent,
    GenerationOptions,
    Input,
    Request,
    TokenEvent,
    check_form,
)
from softprompt.server.logprobs import Scores
from softprompt.server.unserved import OF_STREAM, PARAMETERS, Neutral, asked

if TYPE_CHECKING:
    from softprompt.server.served import Served

MOST_TOKENS, MOST_FIELDS = 1 << 20, 256
_INT64 = 2**63 - 1


def _whole(value: Any) -> Any:
    """Read 3.0 as 3: to JSON they are the same number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _few(value: Any) -> Any:
    """Refuse an object of very many names before each value is looked at."""
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise ValueError(f"fields takes at most {MOST_FIELDS}, got {len(value):,}")
    return value


MOST_ITEMS = 2048
"""Items of a list in a request: OpenAI's limit of the inputs of an embeddings request."""

_T = TypeVar("_T")
# Without fail_fast every wrong item becomes an error of its own in each branch of a union: 2 kB from 3 bytes.
Items = Annotated[list[_T], Field(max_length=MOST_ITEMS, fail_fast=True)]
Several = Annotated[list[_T], Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)]

Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(max_length=1 << 20)]
TokenId = Annotated[Whole, Field(ge=0, le=_INT64)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Fields = Annotated[dict[str, str | float | int], Field(min_length=1), BeforeValidator(_few)]


class Part(BaseModel):
    """A part of a request; unknown names and values of other types are refused.

    Attributes:
        neutral: Names that are not served, and their values that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, values: Any) -> Any:
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        return asked(values, cls.model_fields, required, cls.neutral)


class Body(Part):
    """Parameters of every request."""

    model_config = ConfigDict(allow_inf_nan=False)
    neutral: ClassVar[Neutral] = PARAMETERS

    model: str = Field(description="Name of a prompt, or of the base model.")
    task: str | Whole | None = Field(None, description="Task of a multitask prompt.")
    user: str | None = Field(None, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, values: Any) -> Any:
        _check_text(values)
        return values


Choices = Annotated[list[Text], Field(min_length=1, max_length=1000, fail_fast=True)]


class StreamOptions(Part):
    """Options of a streamed response."""

    neutral: ClassVar[Neutral] = OF_STREAM

    include_usage: bool = False


class JsonSchema(Part):
    """A schema under OpenAI's names; whether it is strict changes nothing, as answers always follow it."""

    neutral: ClassVar[Neutral] = {"strict": None, "description": None, "name": None}

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Part):
    """The form of an answer: OpenAI's ``text``, ``json_object``, ``json_schema``, and ``choice`` and ``regex``."""

    type: Literal["text", "json_object", "json_schema", "choice", "regex"]
    json_schema: JsonSchema | None = None
    choices: Choices | None = None
    regex: Text | None = None

    def options(self) -> dict[str, Any]:
        """Return the form as a generation option, none for plain text; raises ConfigError if a part is missing."""
        schema = self.json_schema and self.json_schema.schema_
        forms: dict[str, tuple[str, Any]] = {
            "json_object": ("json_schema", {"type": "object"}),
            "json_schema": ("json_schema", schema),
            "choice": ("choices", self.choices),
            "regex": ("regex", self.regex),
        }
        if self.type == "text":
            return {}
        name, form = forms[self.type]
        if form is None:
            raise ConfigError(f"response_format of type {self.type} needs {name} beside type; send it")
        return {name: form}


class StructuredOutputs(Part):
    """The form of an answer under vLLM's names, one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None

    def options(self) -> dict[str, Any]:
        """Return the form as a generation option, or as several, where several are asked for."""
        schema = {"type": "object"} if self.json_ is None and self.json_object else self.json_
        return {"json_schema": schema, "regex": self.regex, "choices": self.choice}


class SamplingBody(Body):
    """Sampling parameters, of completions and chats."""

    temperature: float | None = Field(1.0, ge=0, le=100, description="0 is greedy decoding.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=-1, le=_INT64, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    exponential_decay_length_penalty: (
        Annotated[list[float], Field(min_length=2, max_length=2, fail_fast=True)] | None
    ) = Field(None, description="Start, in new tokens, and factor of the end token's logit.")
    seed: Whole | None = Field(None, ge=0, le=_INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    n: Whole | None = Field(1, ge=1, le=128)
    min_tokens: Whole | None = Field(0, ge=0, le=MOST_TOKENS)
    max_time: float | None = Field(None, gt=0, le=86400, description="Seconds.")
    response_format: ResponseFormat | None = Field(None, description="The form that the answer is held to.")
    structured_outputs: StructuredOutputs | None = None
    guided_choice: Choices | None = None
    guided_regex: Text | None = None
    guided_json: dict[str, Any] | str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def form(self) -> dict[str, Any]:
        """Return the form of the answer as a generation option; raises ConfigError if several are asked for."""
        asked = {
            "response_format": self.response_format.options() if self.response_format else {},
            "structured_outputs": self.structured_outputs.options() if self.structured_outputs else {},
            "guided_choice": {"choices": self.guided_choice},
            "guided_regex": {"regex": self.guided_regex},
            "guided_json": {"json_schema": self.guided_json},
        }
        given = {name: (key, v) for name, form in asked.items() for key, v in form.items() if v is not None}
        count = sum(value is not None for form in asked.values() for value in form.values())
        if count > 1:
            raise ConfigError(f"{' and '.join(given)} ask for several forms of one answer; send one")
        if count and self.min_tokens:
            raise ConfigError(
                f"{next(iter(given))} says when the answer ends, token by token; leave min_tokens out"
            )
        return dict(given.values())


def _check_text(value: Any) -> None:
    """Raise on lone surrogates: JSON can spell them, and no tokenizer can encode them."""
    match value:
        case str() if problem := broken(value):
            raise ValueError(f"there is {problem}")
        case dict():
            for key, item in value.items():
                _check_text(key)
                _check_text(item)
        case list():
            for item in value:
                _check_text(item)


_COLDEST = 1e-3
"""Below it logits divided by the temperature overflow float32."""


def options_of(body: SamplingBody, served: Served, tokens: int, seconds: float) -> GenerationOptions:
    """Return a body's generation options; temperature 0 is greedy decoding.

    Args:
        body: The request.
        served: The prompt that answers.
        tokens: Maximum number of new tokens.
        seconds: The server's time limit of a request.

    Raises:
        ConfigError: A value is out of range, or no answer can have the form.
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
        **body.form(),
    }
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature:
        settings |= _sampling(body, temperature)
    options = GenerationOptions(**settings)
    # Here, in a thread, a form takes nobody else's time.
    check_form(served.plain.base, options)
    return options


def _length_penalty(body: SamplingBody) -> tuple[float, float] | None:
    if body.exponential_decay_length_penalty is None:
        return None
    start, factor = body.exponential_decay_length_penalty
    return int(start) if start.is_integer() else start, factor


def _sampling(body: SamplingBody, temperature: float) -> dict[str, Any]:
    if temperature < _COLDEST:
        raise ConfigError(f"temperature is 0 or at least {_COLDEST:g}, got {temperature:g}")
    found: dict[str, Any] = {"decoding_method": "SAMPLING", "seed": body.seed}
    # 1 changes nothing: left out, so that it costs no pass over the vocabulary.
    for name in ("top_p", "typical_p"):
        value = getattr(body, name)
        found[name] = None if value == 1 else value
    found["temperature"] = None if temperature == 1 else temperature
    found["top_k"] = body.top_k if body.top_k and body.top_k > 0 else None
    found["min_p"] = body.min_p or None
    return found


class InputUsage(BaseModel):
    """Tokens of a request, each input counted once; virtual tokens are counted apart from the input's."""

    prompt_tokens: int
    virtual_tokens: int
    total_tokens: int


class Usage(InputUsage):
    """Tokens of a request and of its answers."""

    completion_tokens: int


class GenerationResponse(BaseModel):
    """What the responses of all generating endpoints have in common."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Submission:
    """One HTTP request as requests to the batcher.

    Attributes:
        served: The prompt, in the version that answers.
        inputs: Token ids of the inputs.
        requests: The batcher's requests, one for each input.
    """

    served: Served
    inputs: tuple[Input, ...]
    requests: tuple[Request, ...]


@dataclass(slots=True)
class Choice:
    """One answer in the making."""

    index: int
    text: str = ""
    scores: Scores = field(default_factory=Scores)
    reason: str = "length"
    tokens: int = 0
    seed: int | None = None


@dataclass(slots=True)
class Reply:
    """The answers of a submission, gathered from token events."""

    submission: Submission
    kind: str
    head: dict[str, Any]
    choices: list[Choice]
    reports_usage: bool

    @classmethod
    def of(cls, submission: Submission, body: SamplingBody, prefix: str, kind: str) -> Reply:
        """Return a reply with empty choices.

        Args:
            submission: The submission.
            body: Its body, which says whether a stream ends with the usage.
            prefix: Prefix of its id.
            kind: The response's ``object``.
        """
        head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": submission.served.name,
            # Changes with the prompt's files.
            "system_fingerprint": f"sp-{submission.served.version[:16]}",
        }
        count = sum(request.n for request in submission.requests)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return cls(submission, kind, head, [Choice(index) for index in range(count)], usage)

    def choices_of(self, number: int, event: Event) -> Sequence[Choice]:
        """Return the choices that an event of input ``number`` belongs to."""
        n = self.submission.requests[number].n
        if isinstance(event, EchoEvent):
            return self.choices[number * n : number * n + n]
        return [self.choices[number * n + event.index]]

    def take(self, number: int, event: Event) -> None:
        """Apply an event of input ``number``."""
        for choice in self.choices_of(number, event):
            match event:
                case EchoEvent():
                    choice.scores.take(event)
                case TokenEvent():
                    choice.text += event.text
                    choice.scores.take(event)
                case FinishEvent():
                    choice.reason = event.reason
                    choice.tokens = len(event.tokens)
                    choice.seed = event.seed

    def usage(self) -> dict[str, int]:
        """Return the token counts."""
        inputs = sum(len(each.ids) for each in self.submission.inputs)
        new = sum(choice.tokens for choice in self.choices)
        prompt = self.submission.served.prompt
        virtual = 0 if prompt is None else prompt.tokens * len(self.submission.inputs)
        return {
            "prompt_tokens": inputs,
            "completion_tokens": new,
            "total_tokens": inputs + new,
            "virtual_tokens": virtual,
        }

    def chunk(self, kind: str, *choices: dict[str, Any], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """Return a chunk of a streamed response; ``kind`` is its ``object``."""
        reported = {"usage": usage} if self.reports_usage else {}
        return {**self.head, "object": kind, "choices": list(choices), **reported}

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}
