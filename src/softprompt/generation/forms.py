"""Answers of a form: one of some texts, a regular expression's, or JSON of a schema.

Each next token is one of those that can still lead to such an answer. llguidance, which vLLM uses too, tells which
these are, token by token, from the text of the form. Nothing is computed in advance for the vocabulary, so the form
of a request costs milliseconds, and a hostile one hits the library's own limits. docs/serving.md has the figures,
beside those of outlines-core, which makes an index first.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from softprompt.data import turn_end
from softprompt.errors import ConfigError, ServingError, excerpt

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.generation.options import GenerationOptions

_KEPT = 64
"""Forms of one tokenizer that are kept compiled."""
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As Python writes JSON. Were any whitespace allowed, weak models would write nothing else."""

_forms: WeakKeyDictionary[PreTrainedTokenizerBase, Forms] = WeakKeyDictionary()
_guard = threading.Lock()


@final
class Forms:
    """The forms of answers as one tokenizer spells them; thread-safe.

    Args:
        tokenizer: The base's, a fast one.
        end_ids: The tokens that end an answer.

    Raises:
        ConfigError: llguidance is not installed, or does not read the tokenizer; or no token ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> None:
        try:
            from llguidance import LLMatcher, hf
        except ModuleNotFoundError as error:
            raise ConfigError(
                'answers of a form need llguidance, it is not installed: pip install "softprompt[structured]"'
            ) from error
        if not end_ids:
            raise ConfigError("answers of a form need a tokenizer with an end token, and this one has none")
        try:
            # hf's annotation names a class that transformers gives out under another name as well.
            self._words = hf.from_tokenizer(tokenizer, eos_token=sorted(end_ids))  # type: ignore[arg-type]
        except Exception as cause:  # a slow tokenizer, or one of a kind that the library does not know
            raise ConfigError(f"llguidance does not read this base's tokenizer: {_first_line(cause)}") from cause
        self._matcher = LLMatcher
        self._known: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, options: GenerationOptions) -> Any:
        """Return a matcher at the beginning of an answer; raises ConfigError if the form cannot be followed."""
        grammar = self._grammar(options)
        with self._lock:
            found = self._known.get(grammar)
            if found is None:
                found = self._known[grammar] = self._compiled(grammar)
            self._known.move_to_end(grammar)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return found.deep_copy()

    def _compiled(self, grammar: str) -> Any:
        matcher = self._matcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"no answer can be held to this form: {_first_line(matcher.get_error())}")
        return matcher

    def _grammar(self, options: GenerationOptions) -> str:
        """Return llguidance's grammar of a form, with the space that may stand before an answer."""
        if options.choices:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in options.choices)
            return self._matcher.grammar_from_lark(f'start: " "? ({texts})')
        if options.regex is not None:
            # The library matches whole answers, and has no anchors inside a group.
            pattern = options.regex.removeprefix("^")
            pattern = pattern if pattern.endswith("\\$") else pattern.removesuffix("$")
            self._compiled(self._matcher.grammar_from_regex(pattern))  # by itself: no bracket closes ours
            return self._matcher.grammar_from_regex(f" ?(?:{pattern})")
        schema = json.loads(options.json_schema or "{}")
        schema = {**schema, "x-guidance": _LAYOUT} if isinstance(schema, dict) else schema
        return self._matcher.grammar_from_lark(f'start: " "? json\njson: %json {json.dumps(schema)}')


def form_of(
    tokenizer: PreTrainedTokenizerBase | None, end_ids: Collection[int], options: GenerationOptions, skip: int
) -> FormMask | None:
    """Return what holds an answer, ``skip`` ids in, to the form that options ask for; None where they ask for none.

    Raises:
        ConfigError: As ``Forms``, or no answer can be held to the form.
    """
    if tokenizer is None or not options.has_form:
        return None
    with _guard:
        forms = _forms.get(tokenizer)
        if forms is None:
            forms = _forms[tokenizer] = Forms(tokenizer, end_ids)
    return FormMask(forms.matcher(options), skip)


def end_ids_of(base: Base) -> frozenset[int]:
    """Return the tokens that end an answer: of tokenizer, chat template and generation settings."""
    config = getattr(base.model.generation_config, "eos_token_id", None)
    listed = config if isinstance(config, list) else [config]
    ends = [*listed, base.tokenizer.eos_token_id, *turn_end(base.tokenizer)]
    return frozenset(i for i in ends if i is not None)


def check_form(base: Base, options: GenerationOptions) -> None:
    """Check that answers of a base can be held to the form that options ask for, which is kept ready for them.

    Raises:
        ConfigError: They cannot.
    """
    form_of(base.tokenizer, end_ids_of(base), options, 0)


class FormMask(LogitsProcessor):
    """Leaves only the tokens that go on towards an answer of a form; of one answer, token by token.

    Args:
        matcher: llguidance's, at the beginning.
        skip: Ids before the answer.
    """

    def __init__(self, matcher: Any, skip: int) -> None:
        self._matcher = matcher
        self._done = skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[1, V]``, -inf where the form forbids a token.

        Raises:
            ServingError: The form takes more than the library's limits allow for one token.
        """
        new = input_ids[0, self._done :].tolist()
        self._done += len(new)
        self._matcher.consume_tokens(new)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise ServingError(f"the form asked of this answer is too complex: {reason}; ask for a simpler one")
        # A model may have more logits than its tokenizer has tokens, which nothing spells.
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        known = torch.from_numpy(bits[: scores.shape[1]]).bool()
        allowed[: len(known)] = known
        return scores.masked_fill(~allowed.to(scores.device), -math.inf)


def _first_line(cause: object) -> str:
    """Return what a message says first, or what it calls the error."""
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return excerpt(next((line for line in lines if line.startswith("error: ")), lines[0]), 300)
