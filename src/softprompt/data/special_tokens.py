"""Texts to ids: what special tokens and chat templates put around a text, and a target as its continuation."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast
from weakref import WeakKeyDictionary

from softprompt.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts to continue from. Which one does not matter as long as its tokens stay apart from the
# target's; one of these does in every byte-level, metaspace and WordPiece vocabulary seen.
_CONTEXTS = ("a", ":", "the", "0")
_PROBE = "a"
# A tokenizer has a mode, whether special tokens are read as such, which two threads that want
# different ones would change under each other.
_locks: WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = WeakKeyDictionary()
_guard = threading.Lock()
_SYSTEM, _USER = "SYSTEMTURN", "USERTURN"
"""Stand-ins that a template prints as they are, to see what it puts around them."""


@dataclass(frozen=True, slots=True)
class SpecialFrame:
    """The special tokens that a tokenizer puts before and behind a text, read off the tokenizer itself.

    Llama: ``<s> text``. BART: ``<s> text </s>``. T5: ``text </s>``. GPT-2: nothing.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, as_target: bool = False) -> SpecialFrame:
        """Compare a probe text with and without special tokens.

        Raises:
            BackboneError: The tokenizer does not keep the text's own ids together.
        """
        full = encode(tokenizer, [_PROBE], special=True, as_target=as_target)[0]
        plain = encode(tokenizer, [_PROBE], special=False, as_target=as_target)[0]
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return cls(full[:start], full[start + len(plain) :])
        raise BackboneError(
            f"the tokenizer turns {_PROBE!r} into {list(full)} with special tokens and "
            f"{list(plain)} without; expected the second inside the first, use another tokenizer"
        )

    def around(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``ids`` framed, without repeating special tokens that it begins or ends with."""
        has_prefix = self.prefix and ids[: len(self.prefix)] == self.prefix
        has_suffix = self.suffix and ids[-len(self.suffix) :] == self.suffix
        return (() if has_prefix else self.prefix) + ids + (() if has_suffix else self.suffix)

    def __len__(self) -> int:
        return len(self.prefix) + len(self.suffix)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    special: bool,
    as_target: bool = False,
    marks_are_text: bool = False,
) -> list[tuple[int, ...]]:
    """Return the ids of each text, neither padded nor cut; any thread may call.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        texts: The texts.
        special: Let the tokenizer add its special tokens.
        as_target: Tokenise as a target, which some seq2seq tokenizers do differently.
        marks_are_text: Read a text such as ``</s>`` as characters, not as the special token.
    """
    if not texts:
        return []
    with _guard:
        lock = _locks.setdefault(tokenizer, threading.Lock())
    with lock:
        encoded = tokenizer(
            **{"text_target" if as_target else "text": texts},
            add_special_tokens=special,
            padding=False,
            truncation=False,
            # Length is checked here, against limits of our own, with an error instead of a warning.
            verbose=False,
            split_special_tokens=marks_are_text,
        )
    return [tuple(ids) for ids in encoded["input_ids"]]


class Continuation:
    """The target of a causal model as the natural continuation of its source.

    A source loses its trailing spaces and the target begins with one, because subword vocabularies
    know " complaint" as one piece. When the template ends a line (or in a tab), the target begins
    directly. The ids of a target depend on the template only, never on the record, so that the
    labels of a task form one fixed set of token sequences.

    Attributes:
        separator: What stands between source and target: a space, or nothing after a line end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tail: str) -> None:
        """Take the literal text behind the template's last field."""
        kept = tail.rstrip(" ")
        self._tokenizer = tokenizer
        self._line_end = kept[len(kept.rstrip()) :]
        self.separator = "" if self._line_end else " "

    def of_source(self, rendered: str) -> str:
        """Return the source text without the spaces that the separator stands for."""
        return rendered.rstrip(" ")

    def ids(self, target: str) -> tuple[int, ...]:
        """Return the ids of ``target`` behind a source, without special tokens."""
        text = target if target[:1].isspace() else self.separator + target
        for context in _CONTEXTS:
            before, whole = encode(
                self._tokenizer,
                [context + self._line_end, context + self._line_end + text],
                special=False,
                marks_are_text=True,
            )
            if before and len(whole) > len(before) and whole[: len(before)] == before:
                return whole[len(before) :]
        return encode(self._tokenizer, [text], special=False, marks_are_text=True)[0]

    def text(self, decoded: str) -> str:
        """Return a decoded continuation without the separator."""
        return decoded.removeprefix(self.separator)


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """What a tokenizer's chat template puts around one user turn behind a system turn.

    Attributes:
        frame: The ids before and behind the user's text.
        at: Ids of the frame before the content of the system turn, where the prompt goes.
        tail: Text behind the user's, at the end of which the answer begins.
    """

    frame: SpecialFrame
    at: int
    tail: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Read the frame off the tokenizer's chat template.

        Raises:
            ConfigError: There is no template, or it has no system turn of its own.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                "placement chat_system needs a tokenizer with a chat template, this one has none; "
                "use prefix, or a chat model"
            )
        turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        try:
            rendered = cast(Any, tokenizer).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as cause:  # templates raise what they like
            raise ConfigError(
                f"placement chat_system needs a chat template with a system turn, this one says: {cause}; "
                "use prefix"
            ) from cause
        head, system, rest = str(rendered).partition(_SYSTEM)
        middle, user, tail = rest.partition(_USER)
        if not (system and user):
            raise ConfigError(
                "placement chat_system needs a chat template that prints the system turn before the user's; "
                "use prefix"
            )
        before, between, behind = encode(tokenizer, [head, middle, tail], special=False)
        return cls(SpecialFrame(before + between, behind), len(before), tail)
