"""Generation options of a request, and bounds of what runs requests, checked before a model is used.

Sampling follows from what is given: a temperature above 0, or a filter such as ``top_p``, samples. Where the
decoding method is given as well, a setting that it would ignore raises. Filters left at None are off.

``max_step_tokens`` is 512 by measurement (``bench/serving.py`` and ``bench/decode_step.py`` use it):
from 512 to 2048 neither tokens a second nor label scoring gain. ``max_mixed_step_tokens``, the budget of a
pass while answers run, is measured by ``bench/step_budget.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from softprompt.errors import ConfigError, broken
from softprompt.fields import check, check_number, from_mapping, setting

DecodingMethod = Literal["GREEDY", "SAMPLING"]

_ASKS_FOR_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_SAMPLING_ONLY = (*_ASKS_FOR_SAMPLING, "seed")
_OFF: Mapping[str, tuple[float, ...]] = {"top_k": (0,), "min_p": (0,)}
_OFF_UNASKED: Mapping[str, tuple[float, ...]] = {**_OFF, "top_p": (1,), "typical_p": (1,)}
_OFF_GREEDY: Mapping[str, tuple[float, ...]] = {**_OFF_UNASKED, "temperature": (0, 1)}
"""Values that change nothing, read as None: under SAMPLING, where no method is given, and under GREEDY."""
_DEFAULTS_OF_OTHERS: Mapping[str, tuple[float | None, ...]] = {
    "diversity_penalty": (0,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
}
"""Names of transformers that are not known here, and their values that ask for nothing."""
_LENGTHS, _SAMPLING, _PENALTIES = "Length and stopping", "Decoding and sampling", "Penalties"
_BATCHING = "Batching and caching"
_FORM, _LONGEST_FORM, _DEEPEST_FORM = "Form of the answer", 1 << 16, 256


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How answers are generated; the names are those of caikit's text generation.

    Raises:
        ConfigError: A value is out of range, or would be ignored by the decoding method.
    """

    max_new_tokens: int = setting(
        20, "Maximum number of new tokens, the end token included.", least=1, group=_LENGTHS
    )
    min_new_tokens: int = setting(
        0,
        "Minimum number of new tokens before the end token or a stop sequence is allowed.",
        least=0,
        group=_LENGTHS,
    )
    decoding_method: DecodingMethod | None = setting(
        None,
        "GREEDY takes the most likely token, SAMPLING samples one; by default SAMPLING where a temperature or "
        "a threshold is given.",
        group=_SAMPLING,
    )
    num_beams: int = setting(1, "Beam width; 1 is no beam search. GREEDY only.", least=1, group=_SAMPLING)
    top_k: int | None = setting(
        None, "Top-k sampling: number of most likely tokens to keep.", least=1, group=_SAMPLING
    )
    top_p: float | None = setting(None, "Nucleus (top-p) sampling threshold.", above=0, most=1, group=_SAMPLING)
    min_p: float | None = setting(
        None, "Min-p sampling threshold, relative to the most likely token.", above=0, most=1, group=_SAMPLING
    )
    typical_p: float | None = setting(None, "Locally typical sampling threshold.", above=0, most=1, group=_SAMPLING)
    temperature: float | None = setting(
        None, "Sampling temperature; above 0 it samples, 0 is greedy.", above=0, group=_SAMPLING
    )
    repetition_penalty: float = setting(
        1.0, "Repetition penalty on tokens of the input and the answer; 1 is off.", above=0, group=_PENALTIES
    )
    frequency_penalty: float = setting(
        0.0,
        "Frequency penalty: subtracted from a token's logit for each occurrence in the answer.",
        least=-2,
        most=2,
        group=_PENALTIES,
    )
    presence_penalty: float = setting(
        0.0,
        "Presence penalty: subtracted from the logit of each token that occurs in the answer.",
        least=-2,
        most=2,
        group=_PENALTIES,
    )
    exponential_decay_length_penalty: tuple[int, float] | None = setting(
        None,
        "Exponential length penalty: start, in new tokens, and factor by which the end token's "
        "logit grows with each token after it.",
        group=_LENGTHS,
    )
    max_time: float | None = setting(None, "Time limit of a batch, in seconds.", above=0, group=_LENGTHS)
    stop_sequences: tuple[str, ...] = setting((), "Stop sequences; they are cut from the answer.", group=_LENGTHS)
    seed: int | None = setting(
        None, "Random seed of each sampled answer.", least=0, most=2**63 - 1, group=_SAMPLING
    )
    choices: tuple[str, ...] = setting((), "Text that the answer may be; give two or more.", group=_FORM)
    regex: str | None = setting(
        None, "Regular expression that the whole answer matches (Rust's syntax, no look-around).", group=_FORM
    )
    json_schema: str | None = setting(
        None, "JSON schema of the answer, which is JSON then; {} is any.", group=_FORM
    )
    preserve_input_text: bool = setting(
        False, "Prepend the input to the answer (decoder-only models).", group="Input"
    )

    def __post_init__(self) -> None:
        """Check every value, and the values against each other."""
        if isinstance(self.stop_sequences, str):
            raise ConfigError(
                f"stop_sequences expects a list of texts, not the text {self.stop_sequences!r}; put it in a list"
            )
        object.__setattr__(self, "stop_sequences", tuple(self.stop_sequences))
        if isinstance(self.json_schema, Mapping):
            try:
                object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
            except (ValueError, TypeError, RecursionError) as error:
                raise ConfigError(f"json_schema is not JSON ({error}); give a schema such as {{}}") from error
        object.__setattr__(self, "choices", tuple(self.choices))
        self._check_length_penalty()
        cold = self.decoding_method is None and self._is_off("temperature", (0,))
        if cold:
            object.__setattr__(self, "decoding_method", "GREEDY")
        off = {None: _OFF_UNASKED, "GREEDY": _OFF_GREEDY}.get(self.decoding_method, _OFF)
        for name in [each for each, values in off.items() if self._is_off(each, values)]:
            object.__setattr__(self, name, None)
        check(self)
        for stop in self.stop_sequences:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(f"stop_sequences expects texts of at least one character, got {stop!r}")
            if problem := broken(stop):
                raise ConfigError(f"the stop sequence {stop!r} holds {problem}; no answer can hold it")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens "
                f"{self.max_new_tokens}; lower the one or raise the other"
            )
        self._check_decoding(cold=cold)
        if self.has_form:
            self._check_form()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build options from names and values; defaults of transformers' other options are taken.

        Raises:
            ConfigError: A name is unknown (the nearest known one is named), or a value is out of range.
        """
        others = _DEFAULTS_OF_OTHERS
        known = {n: v for n, v in settings.items() if n not in others or v not in (None, *others[n])}
        if (wanted := known.pop("do_sample", None)) is not None:
            if not isinstance(wanted, bool):
                raise ConfigError(f"do_sample takes true or false; got {wanted!r}")
            method = "SAMPLING" if wanted else "GREEDY"
            if known.get("decoding_method") not in (None, method):
                given = known["decoding_method"]
                raise ConfigError(f"do_sample={wanted} contradicts decoding_method {given}; leave one of them out")
            known["decoding_method"] = method
        return from_mapping(cls, known)

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return self.decoding_method == "SAMPLING"

    @property
    def has_form(self) -> bool:
        """Whether answers are held to a form: choices, a regular expression, or JSON."""
        return bool(self.choices) or self.regex is not None or self.json_schema is not None

    def _check_form(self) -> None:
        forms = {"choices": self.choices, "regex": self.regex, "json_schema": self.json_schema}
        (name, form), *others = ((n, each) for n, each in forms.items() if each not in (None, ()))
        if others:
            raise ConfigError(f"an answer has one form, got {name} and {others[0][0]}; leave one out")
        if sum(map(len, form)) > _LONGEST_FORM:
            raise ConfigError(f"{name} expects at most {_LONGEST_FORM:,} characters, got more; simplify the form")
        for text in form if name == "choices" else [form]:
            if not isinstance(text, str) or not text or broken(text):
                raise ConfigError(f"{name} expects texts of one or more whole characters, got {text!r}")
        if self.json_schema is not None:
            try:
                schema = json.loads(self.json_schema)
                _refuse_deep(schema)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"json_schema is not JSON ({error}); give a schema such as {{}}") from error
            if not isinstance(schema, dict | bool):
                raise ConfigError(f"json_schema expects an object, got {self.json_schema[:60]}")
        if self.min_new_tokens or self.num_beams > 1:
            named = "min_new_tokens" if self.min_new_tokens else "num_beams"
            raise ConfigError(f"{name} says when an answer ends, token by token; leave {named} out")

    def _check_length_penalty(self) -> None:
        name, given = "exponential_decay_length_penalty", self.exponential_decay_length_penalty
        if given is None:
            return
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ConfigError(
                f"{name} expects the tokens to begin after and a factor, such as (10, 1.05), got {given!r}"
            )
        start, factor = given
        check_number(f"the first number of {name}", int, start, least=0)
        check_number(f"the second number of {name}", float, factor, above=0)
        object.__setattr__(self, name, (start, factor))

    def _is_off(self, name: str, values: tuple[float, ...]) -> bool:
        value = getattr(self, name)
        return not isinstance(value, bool) and value in values

    def _check_decoding(self, *, cold: bool) -> None:
        """Settle the decoding method, and raise where it would ignore a setting; ``cold`` is temperature 0."""
        advice = f"under decoding_method {self.decoding_method}; choose SAMPLING"
        asked = [name for name in _ASKS_FOR_SAMPLING if getattr(self, name) is not None]
        if self.decoding_method is None:
            object.__setattr__(self, "decoding_method", "SAMPLING" if asked else "GREEDY")
            advice = "as nothing is sampled; give a temperature"
        if self.samples:
            if self.num_beams > 1:
                raise ConfigError(
                    f"num_beams {self.num_beams} needs decoding_method GREEDY, got "
                    f"{', '.join(asked) or 'SAMPLING'}; leave num_beams at 1 to sample"
                )
            return
        ignored = [name for name in _SAMPLING_ONLY if getattr(self, name) is not None]
        if ignored:
            advice = "at temperature 0; raise the temperature" if cold else advice
            raise ConfigError(f"{', '.join(ignored)} would be ignored {advice} or leave it out")


def _refuse_deep(schema: Any) -> None:
    """Raise ValueError for a schema too deep for what reads it recursively, however deep the stack is by then."""
    level, depth = [schema], 0
    while level:
        if (depth := depth + 1) > _DEEPEST_FORM:
            raise ValueError(f"it is nested more than {_DEEPEST_FORM} deep")
        level = [
            part
            for each in level
            if isinstance(each, dict | list)
            for part in (each.values() if isinstance(each, dict) else each)
        ]


_MIXED = 64
"""Default tokens of a pass beside answers on a CPU; a number of rows that its products are not padded to."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Upper limits of batch, KV cache and queue, for ``Serving`` and the HTTP server alike.

    Raises:
        ConfigError: A value is out of range, or a pass cannot hold one token of every row.
    """

    max_batch_rows: int = setting(
        32, "Maximum batch size: answers generated at the same time.", least=1, group=_BATCHING
    )
    max_step_tokens: int = setting(
        512,
        "Maximum tokens in one forward pass; longer inputs are split over several (chunked prefill).",
        least=1,
        group=_BATCHING,
    )
    max_mixed_step_tokens: int | None = setting(
        None,
        "Maximum tokens in a forward pass while answers run: the next token of each, and parts of new inputs. "
        "By default 64 on a CPU, at least twice --max-batch-rows, and --max-step-tokens elsewhere; at most "
        "--max-step-tokens.",
        least=1,
        group=_BATCHING,
    )
    max_cached_tokens: int = setting(
        65_536, "KV-cache size of the running answers, in tokens.", least=1, group=_BATCHING
    )
    max_queue: int = setting(
        256, "Maximum number of waiting requests; more are refused (HTTP 429).", least=1, group=_BATCHING
    )
    max_score_rows: int = setting(
        512, "Maximum number of labels scored in one forward pass, over all inputs.", least=1, group=_BATCHING
    )
    max_prompts_resident: int = setting(
        64, "LRU cache of prompts: how many are kept in memory.", least=0, group=_BATCHING
    )
    max_prompt_tokens: int = setting(
        16_384, "LRU cache of prompt keys and values: its size in virtual tokens.", least=0, group=_BATCHING
    )
    ordered_weights: bool = setting(
        True,
        "Keep a second copy of a float32 base's weights, ordered for the CPU's matrix "
        "products, where that is faster.",
        group=_BATCHING,
    )

    def __post_init__(self) -> None:
        """Check every bound."""
        check(self)
        for name in ("max_step_tokens", "max_mixed_step_tokens"):
            most = getattr(self, name)
            if most is not None and most < self.max_batch_rows:
                raise ConfigError(
                    f"{name} {most} is below max_batch_rows {self.max_batch_rows}, but "
                    "every row needs a token in each pass; raise the one or lower the other"
                )
        if (mixed := self.max_mixed_step_tokens or 0) > (most := self.max_step_tokens):
            raise ConfigError(
                f"max_mixed_step_tokens {mixed} is above max_step_tokens {most}, which bounds every pass; lower "
                "the one or raise the other"
            )

    def settled(self, device: str, *, offline: bool = False) -> Self:
        """Return the same with its default for mixed passes; where nobody waits for single tokens, no bound."""
        most = self.max_mixed_step_tokens
        if most is None and not offline and device == "cpu":
            most = max(_MIXED, 2 * self.max_batch_rows)
        return replace(self, max_mixed_step_tokens=min(most or self.max_step_tokens, self.max_step_tokens))

    def step_tokens(self, answering: int) -> int:
        """Return the most tokens of a pass in which so many answers go on."""
        return (answering and self.max_mixed_step_tokens) or self.max_step_tokens


def options_from(settings: Mapping[str, Any], caller: str) -> GenerationOptions:
    """Return the options that a caller gave: one object as ``options``, or its fields by name.

    Raises:
        ConfigError: Both were given, or a field is unknown or out of range.
    """
    fields = dict(settings)
    options: GenerationOptions | None = fields.pop("options", None)
    if options is not None and fields:
        raise ConfigError(
            f"{caller} takes options or single settings, got both ({', '.join(fields)}); "
            "put the settings into the options"
        )
    return options or GenerationOptions.from_settings(fields)
