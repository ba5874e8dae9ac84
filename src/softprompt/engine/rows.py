"""What an engine takes and gives: rows that carry their prompts, a batch's virtual tokens in one table, scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from softprompt.backbone import Base, Facts, decoder_embedding, output_limit
from softprompt.errors import ConfigError, ContextOverflowError, DataError
from softprompt.prompts import Prompt

IGNORED = -100
"""Label of a token that nothing is predicted for."""


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One row of a batch: a source, the target to score behind it, and its prompt.

    Rows with the same ``Prompt`` object share it: an engine computes it once where it can.

    Attributes:
        source: Token ids of the input; for seq2seq what the encoder reads.
        target: Token ids of the answer, EOS included; never empty.
        prompt: The row's prompt, None for none; gradients flow into its tensors.
        at: Source tokens before the prompt's input part; 0 puts it in front, ``len(source)`` behind.
        unscored: Indices of target tokens that are read and not scored, as the user's turns between a chat's
            answers; of causal models only.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    prompt: Prompt | None = None
    at: int = 0
    unscored: frozenset[int] = frozenset()

    @property
    def labels(self) -> tuple[int, ...]:
        """The target, -100 where a token is not scored."""
        if not self.unscored:
            return self.target
        return tuple(IGNORED if i in self.unscored else token for i, token in enumerate(self.target))

    @property
    def prefix_tokens(self) -> int:
        """Virtual tokens that stand as keys and values before the row's tokens."""
        return 0 if self.prompt is None else self.prompt.prefix_tokens

    @property
    def prefix_positions(self) -> int:
        """Positions that they take."""
        return 0 if self.prompt is None else self.prompt.prefix_places[-1]

    @property
    def input_tokens(self) -> int:
        """Virtual tokens in the row's input."""
        return 0 if self.prompt is None else self.prompt.input_tokens

    def source_with(self, virtual: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of the input with the prompt's virtual ids at their position."""
        return (*self.source[: self.at], *virtual, *self.source[self.at :])


def check_context(tokens: int, virtual: int, limit: int | None, *, new: int = 0, what: str = "model") -> None:
    """Refuse a row of ``tokens`` behind ``virtual`` virtual tokens, with ``new`` tokens to generate.

    Args:
        tokens: Real tokens of the longest row.
        virtual: Virtual tokens before it.
        limit: Positions the model has; None for relative positions, which have no end.
        new: Tokens that generation may add.
        what: Whose limit it is, for the message.

    Raises:
        ContextOverflowError: If they do not fit.
    """
    if limit is None or tokens + virtual + new <= limit:
        return
    parts = f"{tokens:,} + {virtual:,} virtual tokens"
    if new:
        parts += f" + {new:,} new tokens"
    raise ContextOverflowError(
        f"{parts} exceed the {what}'s {limit:,}; shorten the input, the prompt"
        + (" or max_new_tokens" if new else " or lower max_source_length")
    )


def depends_on_neighbours(rows: Sequence[EngineRow], facts: Facts) -> bool:
    """Tell whether rows of a batch would change each other's rotary positions (``rope_changes_at``)."""
    if facts.rope_changes_at is None:
        return False
    lengths = [r.input_tokens + r.prefix_tokens + len(r.source) + len(r.target) for r in rows]
    return max(lengths) > facts.rope_changes_at


def check_rows(base: Base, rows: Sequence[EngineRow], built: Facts | None = None) -> None:
    """Refuse a batch that cannot be run.

    Args:
        base: The base.
        rows: The rows.
        built: The base's facts when the engine was built, from which virtual ids are counted.

    Raises:
        ConfigError: If the embedding table was resized since, or the model cannot have a prompt where a row has it.
        DataError: If nothing stands before a row's answer, an id is no token of the model, or a
            prompt should stand behind more tokens than there are.
        ContextOverflowError: If a row does not fit behind its prompt.
    """
    model, facts = base.model, base.facts
    if built is not None and built.vocabulary != facts.vocabulary:
        raise ConfigError(
            f"the embedding table had {built.vocabulary:,} rows when the engine was built, now it has "
            f"{facts.vocabulary:,}; resize it first, then build the engine"
        )
    for index, row in enumerate(rows):
        _check_placement(index, row, facts)
        if not row.source and not row.input_tokens:
            raise DataError(
                f"row {index} has an empty input and no prompt in it, so nothing stands before its answer; "
                "give it an input or a prompt"
            )
        if not facts.is_encoder_decoder:
            _check_ids(index, row.source + row.target, facts.vocabulary)
            virtual = row.input_tokens + row.prefix_positions
            check_context(len(row.source) + len(row.target), virtual, facts.context_length)
            continue
        if row.unscored:
            raise ConfigError(
                f"row {index} has target tokens that are not scored, which {facts.architecture} cannot read in "
                "its decoder; score the whole target"
            )
        _check_ids(index, row.source, facts.vocabulary)
        check_context(len(row.source), row.input_tokens, facts.context_length)
        before = row.prefix_tokens + (0 if row.prompt is None else row.prompt.decoder_tokens)
        check_context(len(row.target), before, output_limit(model), what="decoder")
        # A decoder may have a vocabulary of its own.
        _check_ids(index, row.target, int(decoder_embedding(model).weight.shape[0]))


def _check_ids(index: int, ids: Sequence[int], vocabulary: int) -> None:
    """Refuse an id past the table: from V on ids would silently mean virtual tokens."""
    largest = max(ids, default=0)
    if largest >= vocabulary:
        raise DataError(
            f"row {index} holds the id {largest:,}, but the model has {vocabulary:,} tokens; "
            "use the tokenizer that belongs to it"
        )


def _check_placement(index: int, row: EngineRow, facts: Facts) -> None:
    """Refuse a prompt that cannot stand where the row has it."""
    if not 0 <= row.at <= len(row.source):
        raise DataError(
            f"row {index} should have its prompt behind {row.at:,} tokens, but its input has "
            f"{len(row.source):,}; put the prompt earlier"
        )
    if row.prompt is None:
        return
    if row.prompt.decoder is not None and not facts.is_encoder_decoder:
        raise ConfigError(
            f"row {index} has a decoder prompt, but {facts.architecture} has no encoder and decoder; "
            "put its virtual tokens in the input"
        )
    if row.at and row.input_tokens and not row.prompt.sees_input:
        raise ConfigError(
            f"row {index} has its prompt behind {row.at:,} tokens, but a prompt that does not see the "
            "input stands in front of it; use the prefix placement"
        )
    if row.at and row.prompt.prefix is not None:
        raise ConfigError(
            f"row {index} has its prompt behind {row.at:,} tokens, but keys and values stand in front "
            "of the input; use the prefix placement"
        )


Part = Literal["input", "decoder"]
"""Where virtual tokens stand: in the (encoder's) input, or before a seq2seq decoder's."""


@dataclass(frozen=True, slots=True)
class PromptTable:
    """The virtual tokens of a batch of rows, made by ``PromptTable.of(prompts, part)``.

    Rows with the same ``Prompt`` object share its virtual tokens; equal prompts that are two objects do not.

    Attributes:
        table: All virtual tokens ``[N, H]``, token n with the id V + n; ``[0, 0]`` where there are none.
        starts: Table index of each batch row's first virtual token, ``[B]``, on the CPU.
        lengths: Virtual tokens of each batch row, 0 for none, ``[B]``, on the CPU.
        at: Real tokens of each batch row before its virtual ones, ``[B]``, on the CPU.
        sees_input: Whether an encoder's virtual tokens attend to the input.
    """

    table: Tensor
    starts: Tensor
    lengths: Tensor
    at: Tensor
    sees_input: bool = True

    @classmethod
    def of(cls, prompts: Sequence[Prompt | None], part: Part = "input", *, at: Sequence[int] | None = None) -> Self:
        """Gather one part of the rows' prompts.

        Args:
            prompts: Each row's prompt, None for none; one without this part counts as none.
            part: Which part.
            at: Real tokens of each row before its virtual ones; None puts all in front.

        Raises:
            ConfigError: If some of the prompts see the input and others do not.
        """
        parts = {
            prompt: values
            for prompt in dict.fromkeys(prompts)
            if prompt is not None and (values := getattr(prompt, part)) is not None and len(values)
        }
        starts: dict[Prompt | None, int] = {}
        count = 0
        for prompt, values in parts.items():
            starts[prompt] = count
            count += len(values)
        lengths: dict[Prompt | None, int] = {prompt: len(v) for prompt, v in parts.items()}
        sees = {prompt.sees_input for prompt in parts} if part == "input" else set()
        if len(sees) > 1:
            raise ConfigError("some prompts of a batch see the input and others do not; run them apart")
        tables = list(parts.values()) or [torch.empty(0, 0)]
        return cls(
            # One prompt is passed on as the leaf it is: torch.compile cannot trace a hook that holds another.
            tables[0] if len(tables) == 1 else torch.cat(tables),
            torch.tensor([starts.get(prompt, 0) for prompt in prompts], dtype=torch.long),
            torch.tensor([lengths.get(prompt, 0) for prompt in prompts], dtype=torch.long),
            torch.tensor(at or [0] * len(prompts), dtype=torch.long),
            sees != {False},
        )

    @property
    def width(self) -> int:
        """Virtual tokens of the longest prompt in the batch (P)."""
        return int(self.lengths.max()) if self.lengths.numel() else 0

    @property
    def virtual_tokens(self) -> Tensor | None:
        """The virtual tokens to inject for a pass, ``[N, H]``; None where there are none."""
        return self.table if self.width else None

    def injected(self, base: Base, *, decoder: bool = False) -> AbstractContextManager[Any]:
        """Inject the virtual tokens into a base inside the context, which holds its lock.

        Without any, the base runs bit for bit as without this library.

        Args:
            base: The base.
            decoder: Whether they stand among the ids of a seq2seq model's decoder instead of its input.
        """
        if not self.width:
            return base.lock
        return base.running(virtual_tokens=self.table, decoder=decoder)

    def repeated(self, rows: int) -> PromptTable:
        """Return the same prompts for a batch whose rows were each repeated (beams, samples)."""
        times = rows // self.lengths.shape[0]
        return replace(
            self,
            starts=self.starts.repeat_interleave(times),
            lengths=self.lengths.repeat_interleave(times),
            at=self.at.repeat_interleave(times),
        )

    def ids(self, vocabulary: int) -> list[tuple[int, ...]]:
        """Return each row's virtual ids, counted from ``vocabulary`` (V)."""
        spans = zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        return [tuple(range(vocabulary + start, vocabulary + start + n)) for start, n in spans]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes of a batch of rows and which row has which, made by ``Prefixes.of(prompts)``.

    Rows with the same ``Prompt`` object share it.

    Attributes:
        table: Keys and values, padded behind to the longest, ``[K, L, 2, A_kv, P, D]``.
        owner: Prefix of each row, -1 for none, ``[B]``.
        lengths: Virtual tokens of each row's prefix, 0 for none, ``[B]``.
        positions: Positions that they take, ``[B]``.
        sources: The layer whose prefix each layer reads, None for none; None where each reads its own.
    """

    table: Tensor
    owner: Tensor
    lengths: Tensor
    positions: Tensor
    sources: tuple[int | None, ...] | None = None

    @classmethod
    def of(cls, prompts: Sequence[Prompt | None]) -> Self | None:
        """Gather the prefixes of rows, None when no row has one.

        Args:
            prompts: Each row's prompt, None for none; one without keys and values counts as none.
        """
        found = {
            prompt: prompt.prefix
            for prompt in dict.fromkeys(prompts)
            if prompt is not None and prompt.prefix is not None
        }
        if not found:
            return None
        width = max(prompt.prefix_tokens for prompt in found)
        number: dict[Prompt | None, int] = {prompt: i for i, prompt in enumerate(found)}
        padded = [F.pad(p, (0, 0, 0, width - int(p.shape[3]))) for p in found.values()]
        owned = [p if p in number else None for p in prompts]
        lengths = [0 if p is None else p.prefix_tokens for p in owned]
        positions = [0 if p is None else p.prefix_places[-1] for p in owned]
        device = padded[0].device
        return cls(
            torch.stack(padded) if len(padded) > 1 else padded[0].unsqueeze(0),
            torch.tensor([number.get(prompt, -1) for prompt in prompts], device=device),
            torch.tensor(lengths, device=device),
            torch.tensor(positions, device=device),
        )

    @property
    def width(self) -> int:
        """Length of the longest prefix (P)."""
        return int(self.table.shape[4])

    @property
    def layers(self) -> int:
        """Layers (L)."""
        return int(self.table.shape[1])

    def repeated(self, rows: int) -> Prefixes:
        """Return the same prefixes for a batch whose rows were each repeated (beams, samples)."""
        times = rows // self.lengths.shape[0]
        if times == 1:
            return self
        return replace(
            self,
            owner=self.owner.repeat_interleave(times),
            lengths=self.lengths.repeat_interleave(times),
            positions=self.positions.repeat_interleave(times),
        )

    def source(self, index: int) -> int | None:
        """Return the layer whose prefix a layer reads; None where it reads none."""
        return index if self.sources is None else self.sources[index]

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's own keys and values ``[B, A_kv, P, D]``, in dtype and on the device of ``like``."""
        values = self.table[:, index].to(like.device, like.dtype)  # [K, 2, A_kv, P, D]
        owner = self.owner.to(like.device)
        if values.shape[0] == 1:
            # Rows without a prefix get one that their mask hides.
            rows = values.expand(owner.shape[0], -1, -1, -1, -1)
        else:
            rows = values.index_select(0, owner.clamp(min=0))
        return rows[:, 0], rows[:, 1]

    def columns(self) -> Tensor:
        """Return which columns of shifted prefixes are real, bool ``[B, P]``."""
        column = torch.arange(self.width, device=self.lengths.device)
        return column >= self.width - self.lengths.unsqueeze(1)

    def fill(self, cache: Cache, like: Tensor) -> None:
        """Put the prefixes into an empty cache, in dtype and on the device of ``like``."""
        for index in range(self.layers):
            cache.update(*self.layer(index, like), index)

    def shifted(self) -> Prefixes:
        """Return the same prefixes padded in front, so that each ends in the last column."""
        width = self.width
        lengths = [0] * self.table.shape[0]
        for owner, length in zip(self.owner.tolist(), self.lengths.tolist(), strict=True):
            lengths[owner if owner >= 0 else 0] = max(length, lengths[owner if owner >= 0 else 0])
        rolled = [part.roll(width - n, dims=3) for part, n in zip(self.table, lengths, strict=True)]
        return replace(self, table=torch.stack(rolled))
