"""Texts to ids: special tokens around a text and within a template, and a target as a text's continuation."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from softprompt.errors import BackboneError, DataError, broken, excerpt

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
_ESCAPE, _END = "\ufdd0", "\ufdd1"
"""Two code points that are no characters in Unicode and are left to programs for such use."""
_STAND_IN = re.compile(f"{_ESCAPE}([0-9]+){_END}")
_IN_BRACKETS = re.compile(r"[<\[{(].+[>\]})]", re.DOTALL)


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

    def inside(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return framed ids without the frame."""
        return ids[len(self.prefix) : len(ids) - len(self.suffix)]

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

    Raises:
        DataError: A text holds half a surrogate pair.
    """
    for text in texts:
        if problem := broken(text):
            raise DataError(f"expected whole characters, got {problem}: {excerpt(text)!r}; correct the text")
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


def _continued(tokenizer: PreTrainedTokenizerBase, text: str, line_end: str = "") -> tuple[int, ...]:
    """Return the ids of a text as they are behind another one, without special tokens."""
    for context in _CONTEXTS:
        given = [context + line_end, context + line_end + text]
        before, whole = encode(tokenizer, given, special=False, marks_are_text=True)
        if before and len(whole) > len(before) and whole[: len(before)] == before:
            return whole[len(before) :]
    return encode(tokenizer, [text], special=False, marks_are_text=True)[0]


class Marks:
    """The special tokens of a template, apart from texts in its values that only look like them.

    A value is hidden before the template prints it: what reads as a special token gives way to a
    stand-in, so that every special token of the printed text is the template's own.

    Attributes:
        found: Whether the template has special tokens at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Sequence[str]) -> None:
        """Take the template's own text, or its source.

        Beside the tokenizer's special tokens those added tokens count that the template has and that stand in
        brackets, as ``<|User|>`` does in some chat models.
        """
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        special = {str(mark) for mark in tokenizer.all_special_tokens}
        special |= {text for text, token in added.items() if token.special}
        used = {mark for mark in {*special, *added} if any(mark in literal for literal in template)}
        self._tokenizer = tokenizer
        self._added = added
        self._special = tuple(sorted(special))
        bracketed = {mark for mark in used - special if _IN_BRACKETS.fullmatch(mark)}
        self._stand_ins = (_ESCAPE, "", *self._special, *sorted(bracketed))
        self._pattern = _any_of(self._stand_ins[2:])
        self._joined: dict[str, bool] = {}
        self._hidden = {True: _any_of((_ESCAPE, *self._special)), False: _any_of((_ESCAPE, *self._stand_ins[2:]))}
        self.found = bool(used & special or bracketed)

    def hide(self, value: str, *, special_only: bool = False) -> str:
        """Return a value for the template to print; ``special_only`` leaves other added tokens as they are."""
        return self._hidden[special_only].sub(lambda found: self._stand_in(found[0]), value)

    def enclosed(self, value: str) -> str:
        """Return a value hidden, and kept from forming a special token with what stands around it."""
        edge = self._stand_in("")
        return edge + self.hide(value) + edge

    def without_edges(self, printed: str) -> str:
        """Return a printed text that a template may trim: none is before its first character or behind its last."""
        edge = self._stand_in("")
        return re.sub(rf"^(\s|{edge})+|(\s|{edge})+$", lambda found: found[0].replace(edge, ""), printed)

    def without_end(self, printed: str) -> str:
        """Return a printed text without spaces at its end."""
        edge = self._stand_in("")
        while printed.endswith((" ", edge)):
            printed = printed.rstrip(" ").removesuffix(edge)
        return printed

    def spells(self, word: str) -> bool:
        """Whether a word in brackets is a special token."""
        return any(re.sub(r"\W", "", mark) == word for mark in self._special)

    def ends(self, printed: str) -> list[int]:
        """Return where each of the special tokens of a printed text ends."""
        return [found.end() for found in self._pattern.finditer(printed)]

    def ids(self, printed: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of printed texts: of the values as characters, of the template with its special tokens."""
        plain = [_STAND_IN.sub(lambda found: self._stand_ins[int(found[1])], text) for text in printed]
        found = encode(self._tokenizer, plain, special=False)
        for number, (text, whole) in enumerate(zip(printed, plain, strict=True)):
            if len(self._pattern.findall(text)) != len(self._pattern.findall(whole)):
                found[number] = self._apart(text)
        return found

    def _apart(self, printed: str) -> tuple[int, ...]:
        """Return the ids of a text with marks in its values: the texts between the template's marks, each alone."""
        ids: list[int] = []
        start, before = 0, ""
        for match in [*self._pattern.finditer(printed), None]:
            text = printed[start : match.start() if match else None]
            if before and getattr(self._added.get(before), "rstrip", False):
                text = text.lstrip()
            if match and getattr(self._added.get(match[0]), "lstrip", False):
                text = text.rstrip()
            ids += self._between(text, before)
            if match:
                ids.append(cast(int, self._tokenizer.convert_tokens_to_ids(match[0])))
                start, before = match.end(), match[0]
        return tuple(ids)

    def _between(self, text: str, before: str) -> list[int]:
        """Return the ids of a text without marks of the template, behind one of them or at the beginning."""
        pieces = [""]
        for position, part in enumerate(_STAND_IN.split(text)):
            mark = self._stand_ins[int(part)] if position % 2 else part
            if position % 2 and mark not in (_ESCAPE, "", *self._special):
                # Tokenizers read added tokens that are not special always, so they are broken up.
                pieces[-1] += mark[0]
                pieces.append(mark[1:])
            else:
                pieces[-1] += mark
        return [token for piece in pieces if piece for token in self._piece(piece, before)]

    def _piece(self, text: str, before: str) -> tuple[int, ...]:
        if before and before not in self._joined:
            alone, behind = encode(self._tokenizer, [_PROBE, before + _PROBE], special=False)
            self._joined[before] = behind[1:] != alone
        if before and self._joined[before]:
            # This tokenizer puts a space before a text, but none behind a special token.
            return _continued(self._tokenizer, text)
        return encode(self._tokenizer, [text], special=False, marks_are_text=True)[0]

    def _stand_in(self, mark: str) -> str:
        return f"{_ESCAPE}{self._stand_ins.index(mark)}{_END}"


def _any_of(marks: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds the longest mark first, as tokenizers do; of no marks one that finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")


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

    def ids(self, target: str) -> tuple[int, ...]:
        """Return the ids of ``target`` behind a source, without special tokens."""
        text = target if target[:1].isspace() else self.separator + target
        return _continued(self._tokenizer, text, self._line_end)

    def text(self, decoded: str) -> str:
        """Return a decoded continuation without the separator."""
        return decoded.removeprefix(self.separator)
