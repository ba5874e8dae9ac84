"""What a caller may ask of generation, checked before a model is touched.

Every setting that the chosen decoding would ignore is refused instead: a temperature
under GREEDY says that the caller expects sampling. Sampling filters left at None are off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from softprompt.errors import ConfigError, nearest

DecodingMethod = Literal["GREEDY", "SAMPLING"]

_SAMPLING_ONLY = ("top_k", "top_p", "min_p", "typical_p", "temperature", "seed")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How answers are generated; the names are those of caikit's text generation.

    Raises:
        ConfigError: A value is out of range, or would be ignored by the decoding method.
    """

    max_new_tokens: int = field(
        default=20, metadata={"help": "Most tokens of an answer, the end token counted."}
    )
    min_new_tokens: int = field(
        default=0, metadata={"help": "Tokens before the end token or a stop sequence may end it."}
    )
    decoding_method: DecodingMethod = field(
        default="GREEDY", metadata={"help": "GREEDY takes the likeliest token, SAMPLING draws."}
    )
    num_beams: int = field(
        default=1, metadata={"help": "Beams of the search; 1 is no beam search. GREEDY only."}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Draw among the k likeliest tokens. SAMPLING only."}
    )
    top_p: float | None = field(
        default=None,
        metadata={"help": "Draw among the likeliest tokens of this total mass. SAMPLING only."},
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Draw among tokens at least this share as likely as the likeliest. SAMPLING only."
        },
    )
    typical_p: float | None = field(
        default=None,
        metadata={"help": "Draw among the most typical tokens of this mass. SAMPLING only."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Divides the logits before drawing. SAMPLING only."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1 makes tokens of the input and answer less likely."}
    )
    frequency_penalty: float = field(
        default=0.0,
        metadata={"help": "Taken from a token's logit for each time it is in the answer."},
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "Taken from a token's logit if it is in the answer."}
    )
    exponential_decay_length_penalty: tuple[int, float] | None = field(
        default=None,
        metadata={
            "help": "After so many tokens, the end token's logit grows by this factor with each."
        },
    )
    max_time: float | None = field(
        default=None, metadata={"help": "Seconds after which a batch stops where it is."}
    )
    stop_sequences: tuple[str, ...] = field(
        default=(), metadata={"help": "Texts that end an answer; they are cut from it."}
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of each answer's draws. SAMPLING only."}
    )
    preserve_input_text: bool = field(
        default=False, metadata={"help": "Put the input in front of the answer (decoder models)."}
    )

    def __post_init__(self) -> None:
        """Check every value, and the values against each other."""
        if isinstance(self.stop_sequences, str):
            raise ConfigError(
                f"stop_sequences expects a list of texts, not the text {self.stop_sequences!r}; "
                "put it in a list"
            )
        object.__setattr__(self, "stop_sequences", tuple(self.stop_sequences))
        self._check_counts()
        self._check_numbers()
        self._check_length_penalty()
        self._check_decoding()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build options from named settings.

        Raises:
            ConfigError: A name is unknown, or a value is refused.
        """
        known = [each.name for each in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(
                    f"unknown generation option {name!r}{nearest(name, known)}; "
                    f"known are {', '.join(known)}"
                )
        return cls(**settings)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn instead of taken."""
        return self.decoding_method == "SAMPLING"

    def _check_counts(self) -> None:
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("num_beams", 1)):
            _check_integer(name, getattr(self, name), least)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, most=2**63 - 1)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens "
                f"{self.max_new_tokens}; lower the one or raise the other"
            )

    def _check_numbers(self) -> None:
        _check_number("repetition_penalty", self.repetition_penalty)
        for name, most in (
            ("top_p", 1.0),
            ("min_p", 1.0),
            ("typical_p", 1.0),
            ("temperature", math.inf),
            ("max_time", math.inf),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, most)
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not -2 <= value <= 2:
                raise ConfigError(f"{name} expects a number from -2 to 2, got {value!r}")
        for stop in self.stop_sequences:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(
                    f"stop_sequences expects texts of at least one character, got {stop!r}"
                )

    def _check_length_penalty(self) -> None:
        name, given = "exponential_decay_length_penalty", self.exponential_decay_length_penalty
        if given is None:
            return
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ConfigError(
                f"{name} expects the tokens to begin after and a factor, such as (10, 1.05), got {given!r}"
            )
        start, factor = given
        _check_integer(f"the first number of {name}", start, 0)
        _check_number(f"the second number of {name}", factor)
        object.__setattr__(self, name, (start, factor))

    def _check_decoding(self) -> None:
        if self.decoding_method not in ("GREEDY", "SAMPLING"):
            raise ConfigError(
                f"decoding_method expects GREEDY or SAMPLING, got {self.decoding_method!r}"
            )
        if self.samples:
            if self.num_beams > 1:
                raise ConfigError(
                    f"num_beams {self.num_beams} needs decoding_method GREEDY, got SAMPLING; "
                    "leave num_beams at 1 to sample"
                )
            return
        ignored = [name for name in _SAMPLING_ONLY if getattr(self, name) is not None]
        if ignored:
            raise ConfigError(
                f"{', '.join(ignored)} would be ignored under decoding_method GREEDY; "
                "choose SAMPLING or leave it out"
            )


def options_from(
    options: GenerationOptions | None, settings: Mapping[str, Any], caller: str
) -> GenerationOptions:
    """Return the options a caller gave whole or field by field.

    Raises:
        ConfigError: Both were given, or a setting is unknown or out of range.
    """
    if options is not None and settings:
        raise ConfigError(
            f"{caller} takes options or single settings, got both ({', '.join(settings)}); "
            "put the settings into the options"
        )
    return options or GenerationOptions.from_settings(settings)


def _check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} expects a whole number of at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ConfigError(f"{name} expects a whole number of at most {most}, got {value!r}")


def _check_number(name: str, value: Any, most: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= most or math.isinf(value):
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise ConfigError(f"{name} expects a finite number above 0{limit}, got {value!r}")
