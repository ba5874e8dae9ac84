"""The target of a causal model as the natural continuation of its source.

A source loses its trailing spaces and the target begins with one, because subword vocabularies
know " complaint" as one piece. When the template ends a line (or in a tab), the target begins
directly. The ids of a target depend on the template only, never on the record, so that the
labels of a task form one fixed set of token sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softprompt.data.special_frame import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts to continue from. Which one does not matter as long as its tokens stay apart from the
# target's; one of these does in every byte-level, metaspace and WordPiece vocabulary seen.
_CARRIERS = ("a", ":", "the", "0")


class Continuation:
    """How a target follows the sources of one template.

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
        for carrier in _CARRIERS:
            before, whole = encode(
                self._tokenizer,
                [carrier + self._line_end, carrier + self._line_end + text],
                special=False,
                marks_are_text=True,
            )
            if before and len(whole) > len(before) and whole[: len(before)] == before:
                return whole[len(before) :]
        return encode(self._tokenizer, [text], special=False, marks_are_text=True)[0]

    def text(self, decoded: str) -> str:
        """Return a decoded continuation without the separator."""
        return decoded.removeprefix(self.separator)
