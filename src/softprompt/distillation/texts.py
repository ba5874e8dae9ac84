"""What is distilled: a system prompt, documents in chunks, or examples, as the tokens that a teacher reads."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from softprompt.data import DataSource, Record, RowTokenizer, encode, label_set, read_records
from softprompt.errors import ConfigError, ContextOverflowError, DataError, UsageError

Text: TypeAlias = str | Path
"""A text, or the file that holds it."""

BETWEEN = "\n\n"
"""What stands behind a text outside a chat, and behind each example, as in the baselines of ``evaluate``."""
_CHUNK = 2048
"""Tokens of a chunk, where nothing else is said (512 to 4,096 in arXiv:2506.06266)."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What a teacher reads at once: a whole text, or a chunk of a document.

    Attributes:
        number: From 0.
        source: Where it is from, such as ``manual.txt, chunk 2 of 5``.
        ids: Its tokens.
    """

    number: int
    source: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """The texts of a run, read and not tokenised yet.

    Attributes:
        kind: ``system prompt``, ``document`` or ``examples``.
        texts: Each text by where it is from; of examples none.
        examples: The records of examples.
    """

    kind: str
    texts: tuple[tuple[str, str], ...] = ()
    examples: tuple[Record, ...] = ()

    @classmethod
    def of(
        cls,
        system_prompt: Text | None,
        documents: Sequence[Text],
        examples: DataSource | None,
        **columns: str | None,
    ) -> Reading:
        """Read the one of the three that is given; ``columns`` are those of examples, as ``read_records`` has them.

        Raises:
            UsageError: None is given, or several are.
            DataError: A text is empty or no UTF-8, or an example has no target.
        """
        given = {
            "system_prompt": system_prompt is not None,
            "documents": bool(documents),
            "examples": examples is not None,
        }
        if sum(given.values()) != 1:
            named = " and ".join(name for name, is_given in given.items() if is_given) or "none of them"
            raise UsageError(f"expected one of system_prompt, documents and examples to distil, got {named}")
        if examples is not None:
            return cls("examples", examples=tuple(read_records(examples, **columns)))
        if system_prompt is not None:
            return cls("system prompt", (_read(system_prompt, "the system prompt"),))
        return cls("document", tuple(_read(each, f"document {n}") for n, each in enumerate(documents, start=1)))

    def labels(self, task: Literal["classification", "generation"] | None) -> tuple[str, ...] | None:
        """Return the label set of examples whose targets are labels, or look like some where no task is named."""
        return label_set([str(each.target) for each in self.examples], task=task) if self.examples else None

    def digest(self) -> str:
        """Return the SHA-256 of all that was read."""
        content = [self.kind, self.texts, [(sorted(each.fields.items()), each.target) for each in self.examples]]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def passages(self, rows: RowTokenizer, room: int | None, chunk_tokens: int | None) -> tuple[Passage, ...]:
        """Return what the teacher reads, in an order that is that of the texts.

        Args:
            rows: What renders examples.
            room: Tokens that a passage may have at most; None is no limit.
            chunk_tokens: Tokens of a chunk at most.

        Raises:
            ContextOverflowError: A text that is not cut does not fit, or a chunk as long as was asked for.
        """
        if self.kind != "document" and chunk_tokens is not None:
            raise ConfigError(
                f"chunk_tokens would be ignored: only documents are cut, not {self.kind}; leave it out"
            )
        if chunk_tokens is not None and room is not None and chunk_tokens > room:
            raise ContextOverflowError(f"chunks of {chunk_tokens:,} tokens do not fit: {_too_long(room)}")
        if self.kind == "examples":
            between = rows.text(BETWEEN)
            ids = [token for each in self.examples for token in (*rows.demonstration(each), *between)]
            whole = [(f"{len(self.examples)} examples", tuple(ids[: len(ids) - len(between)]))]
        else:
            found = encode(rows.tokenizer, [text for _, text in self.texts], special=False, marks_are_text=True)
            whole = [(name, ids) for (name, _), ids in zip(self.texts, found, strict=True)]
        if self.kind == "document":
            whole = [chunk for each in whole for chunk in _chunks(*each, room, chunk_tokens)]
        for name, ids in whole:
            if room is not None and len(ids) > room:
                raise ContextOverflowError(
                    f"{name} has {len(ids):,} tokens and does not fit: {_too_long(room)}, or give it as a document, "
                    "which is cut"
                )
        return tuple(Passage(number, name, ids) for number, (name, ids) in enumerate(whole))


def start_ids(how: str, passages: Sequence[Passage], count: int, vocabulary: int, seed: int) -> list[int]:
    """Return the tokens whose embeddings, or keys and values, a prompt starts at.

    Args:
        how: ``text`` takes the first tokens, ``chunks`` equal pieces from random places of the text in order,
            ``vocabulary`` any tokens.
        passages: The text.
        count: Tokens wanted.
        vocabulary: Tokens there are.
        seed: Seed of what is drawn.

    Raises:
        ConfigError: The text has fewer tokens.
    """
    ids = [token for each in passages for token in each.ids]
    if len(ids) < count:
        raise ConfigError(
            f"num_virtual_tokens {count} is more than the {len(ids)} tokens of the text, so nothing would be saved; "
            "lower it"
        )
    if how == "text":
        return ids[:count]
    draw = random.Random(f"start {seed}")
    if how == "vocabulary":
        return [draw.randrange(vocabulary) for _ in range(count)]
    size = min(_PIECE, count)
    starts = sorted(draw.randrange(len(ids) - size + 1) for _ in range(-(-count // size)))
    return [token for start in starts for token in ids[start : start + size]][:count]


_PIECE = 8
"""Tokens of the pieces that ``chunks`` starts from."""


def _read(given: Text, name: str) -> tuple[str, str]:
    if isinstance(given, Path):
        name = given.name
        try:
            text = given.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {given}: {error}; give a text file in UTF-8") from error
    else:
        text = given
    if not text.strip():
        raise DataError(f"{name} is empty; there is nothing to distil")
    return name, text.strip()


def _chunks(
    name: str, ids: tuple[int, ...], room: int | None, chunk_tokens: int | None
) -> list[tuple[str, tuple[int, ...]]]:
    """Return a document in equal parts, as few as there can be; one that fits is whole where no size was asked for."""
    if chunk_tokens is None:
        chunk_tokens = len(ids) if room is None or len(ids) <= room else min(_CHUNK, room)
    count = -(-len(ids) // chunk_tokens)
    borders = [round(len(ids) * i / count) for i in range(count + 1)]
    of = [""] if count == 1 else [f", chunk {i + 1} of {count}" for i in range(count)]
    return [(name + of[i], ids[borders[i] : borders[i + 1]]) for i in range(count)]


def _too_long(room: int) -> str:
    return (
        f"the model's context leaves {room:,} beside max_source_length and max_target_length; lower these, "
        "shorten the text"
    )
