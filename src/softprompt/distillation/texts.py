"""What is distilled: a system prompt, documents in chunks, or examples, as the tokens that a teacher reads."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from softprompt.data import DataSource, Record, RowTokenizer, encode, label_set, read_records
from softprompt.errors import ConfigError, ContextOverflowError, DataError, UsageError
from softprompt.untrusted import read_text

Text: TypeAlias = str | Path
"""A text, or the file that holds it."""

BETWEEN = "\n\n"
"""What stands behind a text outside a chat, and behind each example, as in the baselines of ``evaluate``."""
_CHUNK = 2048
"""Tokens of a chunk at most, where nothing else is said (512 to 4,096 in arXiv:2506.06266)."""
_MOST_BYTES = 64 << 20
_PIECE = 8
"""Tokens of the pieces that a prompt may start at."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What a teacher reads at once, a whole text or a chunk: its number from 0, where it is from, its tokens."""

    number: int
    source: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourceText:
    """Texts, read and not tokenised yet.

    Attributes:
        kind: ``system prompt``, ``document`` or ``examples``.
        texts: Where each text is from, and the text; of examples none.
        examples: Fields and target of each example.
    """

    kind: str
    texts: Sequence[tuple[str, str]] = ()
    examples: Sequence[tuple[Mapping[str, str], str]] = ()

    @classmethod
    def of(
        cls,
        system_prompt: Text | None,
        documents: Sequence[Text],
        examples: DataSource | None,
        columns: Mapping[str, str | None],
    ) -> SourceText:
        """Read the one of the three that is given; ``columns`` are those of examples, for ``read_records``.

        Raises:
            UsageError: None is given, or several are.
            DataError: A text is empty or no UTF-8, or an example has no target.
        """
        given = {"system_prompt": system_prompt, "documents": documents or None, "examples": examples}
        names = [name for name, each in given.items() if each is not None]
        if len(names) != 1:
            named = " and ".join(f"{name}=..." for name in names) or "none"  # with =, a command names its option
            raise UsageError(f"expected one of {'=..., '.join(given)}=... to distil, got {named}; give one text")
        if examples is not None:
            found = read_records(examples, use="train", **cast(Any, columns))
            return cls("examples", examples=[(dict(each.fields), str(each.target)) for each in found])
        if system_prompt is not None:
            return cls("system prompt", [_read(system_prompt, "the system prompt")])
        return cls("document", [_read(each, f"document {n}") for n, each in enumerate(documents, start=1)])

    def labels(self, task: Literal["classification", "generation"] | None) -> tuple[str, ...] | None:
        """Return the label set of examples whose targets are labels, or look like some where no task is named."""
        return label_set([target for _, target in self.examples], task=task) if self.examples else None

    def passages(self, rows: RowTokenizer, room: int | None, chunk_tokens: int | None) -> tuple[Passage, ...]:
        """Return what the teacher reads, in the order of the texts.

        Args:
            rows: What renders examples.
            room: Tokens that a passage may have at most; None is no limit.
            chunk_tokens: Tokens of a document's chunk at most; None leaves one that fits whole.

        Raises:
            ContextOverflowError: A text that is not cut does not fit, or a chunk as long as was asked for.
        """
        if self.kind != "document" and chunk_tokens is not None:
            raise ConfigError(f"chunk_tokens would be ignored: documents are cut, no {self.kind}; leave it out")
        if self.kind == "examples":
            between, shown = rows.text(BETWEEN), list[int]()
            for example in self.examples:
                shown += (*(between if shown else ()), *rows.demonstration(Record(*example)))
            whole = [(f"{len(self.examples)} examples", tuple(shown))]
        else:
            ids = encode(rows.tokenizer, [text for _, text in self.texts], special=False, marks_are_text=True)
            whole = [(name, each) for (name, _), each in zip(self.texts, ids, strict=True)]
        if self.kind == "document":
            whole = [chunk for each in whole for chunk in _chunks(*each, room, chunk_tokens)]
        for name, each in whole:
            if room is not None and len(each) > room:
                raise ContextOverflowError(
                    f"{name}: {len(each):,} tokens, the model's context has room for {max(0, room):,} beside "
                    "max_source_length and max_target_length; lower these or chunk_tokens, or shorten the text, or "
                    "give it as a document, which is cut"
                )
        return tuple(Passage(number, *each) for number, each in enumerate(whole))


def start_ids(how: str, passages: Sequence[Passage], count: int, vocabulary: int, seed: int) -> list[int]:
    """Return the tokens whose embeddings, or keys and values, a prompt of ``count`` virtual tokens starts at.

    Args:
        how: ``text`` takes the first tokens, ``chunks`` pieces from random places in the order of the text,
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
        raise ConfigError(f"num_virtual_tokens {count} is more than the {len(ids)} tokens of the text; lower it")
    draw = random.Random(f"start {seed}")
    if how == "vocabulary":
        return [draw.randrange(vocabulary) for _ in range(count)]
    if how == "text":
        return ids[:count]
    size = min(_PIECE, count)
    starts = sorted(draw.randrange(len(ids) - size + 1) for _ in range(-(-count // size)))
    return [token for start in starts for token in ids[start : start + size]][:count]


def _read(given: Text, name: str) -> tuple[str, str]:
    text = given
    if isinstance(given, Path):
        name, text = given.name, read_text(given, _MOST_BYTES, DataError)
    if not str(text).strip():
        raise DataError(f"{name} is empty; there is nothing to distil")
    return name, str(text).strip()


def _chunks(name: str, ids: Sequence[int], room: int | None, most: int | None) -> list[tuple[str, tuple[int, ...]]]:
    """Return a document in as few equal parts as there can be."""
    if most is None:
        most = len(ids) if room is None or len(ids) <= room else max(1, min(_CHUNK, room))
    count = -(-len(ids) // most)
    borders = [round(len(ids) * i / count) for i in range(count + 1)]
    names = [name] if count == 1 else [f"{name}, chunk {i + 1} of {count}" for i in range(count)]
    return [(names[i], tuple(ids[borders[i] : borders[i + 1]])) for i in range(count)]
