"""Request parameters: what the endpoints have in common, and sampling parameters as options.

Names and ranges are OpenAI's and vLLM's; an unknown name raises, naming the nearest known one.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from softprompt.errors import ConfigError
from softprompt.generation import GenerationOptions

MOST_TOKENS = 1 << 20
_INT64 = 2**63 - 1


def _whole(value: Any) -> Any:
    """Read 3.0 as 3: to JSON they are the same number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(max_length=1 << 20)]
TokenIds = Annotated[list[Annotated[Whole, Field(ge=0, le=_INT64)]], Field(min_length=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Fields = Annotated[dict[str, str | float | int], Field(min_length=1)]


class Body(BaseModel):
    """Parameters of every request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(description="Name of a prompt, or of the base model.")
    task: str | Whole | None = Field(None, description="Task of a multitask prompt.")
    user: str | None = Field(None, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, values: Any) -> Any:
        _check_text(values)
        return values


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


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
        Annotated[list[float], Field(min_length=2, max_length=2)] | None
    ) = Field(None, description="Start, in new tokens, and factor of the end token's logit.")
    seed: Whole | None = Field(None, ge=0, le=_INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Whole | None = Field(1, ge=1, le=128)
    min_tokens: Whole | None = Field(0, ge=0, le=MOST_TOKENS)
    max_time: float | None = Field(None, gt=0, le=86400, description="Seconds.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None


def _check_text(value: Any) -> None:
    """Raise on lone surrogates: JSON can spell them, and no tokenizer can encode them."""
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


_COLDEST = 1e-3
"""Below it logits divided by the temperature overflow float32."""


def options_of(body: SamplingBody, tokens: int, seconds: float) -> GenerationOptions:
    """Return a body's generation options; temperature 0 is greedy decoding.

    Args:
        body: The request.
        tokens: Maximum number of new tokens.
        seconds: The server's time limit of a request.

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
