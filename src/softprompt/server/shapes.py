"""What clients may send, in OpenAI's words; what is not known is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

MOST_TOKENS = 1 << 20
_INT64 = 2**63 - 1


def _whole(value: Any) -> Any:
    """Take 3.0 for 3: to JSON they are the same number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(max_length=1 << 20)]
TokenIds = Annotated[list[Annotated[Whole, Field(ge=0, le=_INT64)]], Field(min_length=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Fields = Annotated[dict[str, str | float | int], Field(min_length=1)]


class Body(BaseModel):
    """What all requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(description="Name of a prompt, or of the base model.")
    task: str | Whole | None = Field(None, description="Task of a multitask prompt.")
    user: str | None = Field(None, description="Taken and not used.")

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, values: Any) -> Any:
        _check_text(values)
        return values


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Generation(Body):
    """How answers are generated."""

    temperature: float | None = Field(1.0, ge=0, le=100, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=-1, le=_INT64, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    exponential_decay_length_penalty: (
        Annotated[list[float], Field(min_length=2, max_length=2)] | None
    ) = Field(None, description="Tokens after which the end gets likelier, and the factor.")
    seed: Whole | None = Field(None, ge=0, le=_INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Whole | None = Field(1, ge=1, le=128)
    min_tokens: Whole | None = Field(0, ge=0, le=MOST_TOKENS)
    max_time: float | None = Field(None, gt=0, le=86400, description="Seconds.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class CompletionBody(Generation):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
        | None
    ) = Field(None, description="The template's input, or token ids, which are taken as they are.")
    fields: Fields | Annotated[list[Fields], Field(min_length=1)] | None = Field(
        None, description="Fields of a template that has several; instead of prompt."
    )
    raw: bool = Field(False, description="Put prompt in front of the model without the template.")
    truncate_input: bool = Field(False, description="Cut an input that is too long for the prompt.")
    max_tokens: Whole | None = Field(16, ge=0, le=MOST_TOKENS)
    echo: bool | None = False
    logprobs: Whole | None = Field(None, ge=0, le=20)
    best_of: Whole | None = Field(None, ge=1, le=1, description="Only 1 is served.")
    suffix: None = None
    logit_bias: None = None


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[str, StringConstraints(pattern="^[a-z_]{1,32}$")]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return the turn as a chat template takes it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class ChatBody(Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Whole | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)


class ClassifyBody(Body):
    """``POST /v1/classify``."""

    input: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    fields: Fields | Annotated[list[Fields], Field(min_length=1)] | None = None
    labels: Annotated[list[Stop], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Instead of the prompt's own."
    )
    normalize: bool = Field(False, description="Divide scores by the labels' token counts.")
    truncate_input: bool = False


def _check_text(value: Any) -> None:
    """Refuse halves of characters, which JSON can spell and nothing behind us can read."""
    match value:
        case str() if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"there is half of a character (a lone surrogate) at {error.start} of a text"
                ) from error
        case dict():
            for key, item in value.items():
                _check_text(key)
                _check_text(item)
        case list():
            for item in value:
                _check_text(item)
