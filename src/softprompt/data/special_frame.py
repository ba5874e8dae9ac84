"""The special tokens a tokenizer puts around a text, read off from the tokenizer itself.

Llama: ``<s> text``. BART: ``<s> text </s>``. T5: ``text </s>``. GPT-2: nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from softprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"
# A tokenizer has a mode, whether special tokens are read as such, which two threads that want
# different ones would change under each other.
_locks: WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = WeakKeyDictionary()
_guard = threading.Lock()


@dataclass(frozen=True, slots=True)
class SpecialFrame:
    """The ids before and behind the ids of a plain text."""

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
        """Return ``ids`` framed, without repeating special tokens that the text brought itself."""
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
