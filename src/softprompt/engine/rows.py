"""The rows of a batch that an engine runs, and what is refused of them, with the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.backbone import Base, Facts, decoder_embedding, output_limit
from softprompt.errors import ConfigError, ContextOverflowError, DataError
from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One row of a batch: a source, the target to score behind it, and its prompt.

    Rows with the same ``Prompt`` object share it: an engine computes it once where it can.

    Attributes:
        source: Token ids of the input; for seq2seq what the encoder reads.
        target: Token ids of the answer, EOS included; never empty.
        prompt: The row's prompt, None for none; gradients flow into its tensors.
        at: Source tokens before the prompt's input part; 0 puts it in front, ``len(source)`` behind.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    prompt: Prompt | None = None
    at: int = 0

    @property
    def prefix_tokens(self) -> int:
        """Virtual tokens that stand as keys and values before the row's tokens."""
        return 0 if self.prompt is None else self.prompt.prefix_tokens

    @property
    def input_tokens(self) -> int:
        """Virtual tokens in the row's input."""
        return 0 if self.prompt is None else self.prompt.input_tokens

    def source_with(self, virtual: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of the input with the prompt's virtual ids at their position."""
        return (*self.source[: self.at], *virtual, *self.source[self.at :])


def check_context(
    tokens: int, virtual: int, limit: int | None, *, new: int = 0, what: str = "model"
) -> None:
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
        ConfigError: If the embedding table was resized since, or the model cannot have a prompt where a
            row has it.
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
            virtual = row.input_tokens + row.prefix_tokens
            check_context(len(row.source) + len(row.target), virtual, facts.context_length)
            continue
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
