"""Records to token ids: the template's text kept whole, one BOS, one EOS, truncation counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from softprompt.data.chat_template import ChatFrame, ChatTemplate
from softprompt.data.chats import Chat, chat_of, fitted
from softprompt.data.records import INPUT, Record
from softprompt.data.special_tokens import Continuation, Marks, SpecialFrame, encode
from softprompt.data.template import Verbalizer, cut_values
from softprompt.errors import ConfigError, DataError, TemplateError
from softprompt.prompts import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The ids of one record; a target ends in EOS, and is empty where the record has none."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    source_cut: bool
    target_cut: bool
    at: int = 0
    """Source tokens before the prompt."""
    unscored: frozenset[int] = frozenset()
    """Indices of target tokens that are no answer: what stands between the answers of a chat."""

    @property
    def scored(self) -> int:
        """Target tokens that count."""
        return len(self.target) - len(self.unscored)


@dataclass(frozen=True, slots=True)
class CutSummary:
    """How much of the data the length limits truncated, in records and tokens."""

    records: int
    sources_cut: int
    targets_cut: int
    tokens_dropped: int
    turns_dropped: int = 0
    """The oldest messages of chats that were too long."""

    def __str__(self) -> str:
        if not (self.sources_cut or self.targets_cut):
            return f"{self.records:,} records, none cut"
        turns = f", {self.turns_dropped:,} of the oldest messages" if self.turns_dropped else ""
        return (
            f"{self.records:,} records, cut to the length limits: {self.sources_cut:,} sources, "
            f"{self.targets_cut:,} targets ({self.tokens_dropped:,} tokens{turns} dropped)"
        )


class RowTokenizer:
    """Turns records into the ids of batch rows: what a model reads and what it should answer.

    Causal: source = the tokenizer's leading special tokens + text, no EOS; target = continuation
    + EOS. Seq2seq: both as the tokenizer frames them, which is how such models are trained.
    With a prompt in the system turn the source is the tokenizer's chat template around the text.
    With ``chats`` the template is the tokenizer's own: a record's chat, or its input as one user turn, up to
    the last answer; the target is that answer with the end that the template puts. A chat that is too long
    loses its oldest turns, then the end of its last question.

    Attributes:
        chats: Which answers of a chat are targets, the last or all; None is a verbalizer's texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        verbalizer: Verbalizer,
        *,
        max_source_length: int,
        max_target_length: int,
        seq2seq: bool,
        placement: Placement = Placement.PREFIX,
        chats: Literal["last", "all"] | None = None,
    ) -> None:
        """Read the special tokens off the tokenizer and check the limits (tokens, special ones included).

        Raises:
            ConfigError: A limit leaves no room for text, or the tokenizer has no such placement.
            TemplateError: The template's own text is longer than ``max_source_length``.
        """
        self.tokenizer = tokenizer
        self.verbalizer = verbalizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.seq2seq = seq2seq
        self.placement = placement
        self.chats = chats
        in_chat = placement is Placement.CHAT_SYSTEM
        if chats is not None:
            self._check_chats()
        self._chat = ChatFrame.of(tokenizer) if in_chat else None
        self._source_frame = self._frame_of_sources()
        self._target_frame = self._frame_of_targets()
        tail = verbalizer.tail if self._chat is None else self._chat.tail
        self._continuation = None if seq2seq or chats else Continuation(tokenizer, tail)
        around = [] if self._chat is None else [str(tokenizer.chat_template)]
        self._marks = Marks(tokenizer, [*verbalizer.literals, *around])
        self._target_ids: dict[str, tuple[int, ...]] = {}
        self._check_limits()

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's chat template, with the prompt where the placement has it."""
        return ChatTemplate(self.tokenizer, in_system=self.placement is Placement.CHAT_SYSTEM)

    def tokenize(self, records: Sequence[Record]) -> tuple[list[TokenRow], CutSummary]:
        """Return the ids of all records, and what the limits truncated.

        Raises:
            DataError: A field is missing, or a text is not whole.
        """
        if self.chats is not None:
            found = [self._chat_row(record, number) for number, record in enumerate(records, start=1)]
        else:
            sources = self._sources([record.fields for record in records])
            targets = [self._target(record.target) for record in records]
            found = [
                (
                    TokenRow(source, target, bool(source_loss), bool(target_loss), self.offset(source)),
                    source_loss + target_loss,
                    0,
                )
                for (source, source_loss), (target, target_loss) in zip(sources, targets, strict=True)
            ]
        rows = [row for row, _, _ in found]
        summary = CutSummary(
            records=len(rows),
            sources_cut=sum(row.source_cut for row in rows),
            targets_cut=sum(row.target_cut for row in rows),
            tokens_dropped=sum(tokens for _, tokens, _ in found),
            turns_dropped=sum(turns for _, _, turns in found),
        )
        return rows, summary

    def source(self, fields: Mapping[str, str] | Chat) -> tuple[tuple[int, ...], bool]:
        """Return the ids in front of the answer to fields or a chat, and whether anything was cut.

        Raises:
            DataError: As for ``tokenize``.
        """
        if self.chats is not None:
            whole = chat_of(fields) if isinstance(fields, Mapping) else fields
            kept = fitted(whole, self._chat_fits)
            return self._opening(kept), kept is not whole
        assert isinstance(fields, Mapping)
        ids, loss = self._sources([fields])[0]
        return ids, bool(loss)

    def check(self, records: Sequence[Record], output_field: str | None = None) -> None:
        """Check the template against every record; see ``Verbalizer.check``."""
        if self.chats is None or not all(record.chat for record in records):
            self.verbalizer.check(records, output_field)

    def offset(self, source: Sequence[int]) -> int:
        """Return how many tokens of a source precede the prompt."""
        match self.placement:
            case Placement.AFTER_BOS:
                first = SpecialFrame.of(self.tokenizer).prefix
                return len(first) if tuple(source[: len(first)]) == first else 0
            case Placement.SUFFIX:
                return len(source)
        return 0 if self._chat is None else self._chat.at

    def target(self, text: str) -> tuple[int, ...]:
        """Return the ids of an answer with its EOS, cut to ``max_target_length``."""
        return self._target(text)[0]

    def label(self, text: str) -> tuple[int, ...]:
        """Return the ids of a label, the same as those of a target, never cut.

        Raises:
            DataError: The label does not fit into ``max_target_length``.
        """
        ids, loss = self._target(text)
        if loss:
            raise DataError(
                f"the label {text!r} takes {len(ids) + loss} tokens, max_target_length is "
                f"{self.max_target_length}; raise it or shorten the label"
            )
        return ids

    def labels(self, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the ids of each label of a task.

        Raises:
            DataError: A label does not fit, or the tokenizer cannot tell two of them apart.
        """
        ids = {text: self.label(text) for text in texts}
        owners: dict[tuple[int, ...], str] = {}
        for text, own in ids.items():
            if (other := owners.setdefault(own, text)) != text:
                raise DataError(
                    f"the labels {other!r} and {text!r} are the same tokens to this tokenizer; "
                    "rename one in the data"
                )
        return ids

    def demonstration(self, record: Record) -> tuple[int, ...]:
        """Return the ids of a record and its answer as a text to be read, without special tokens around them.

        Raises:
            DataError: As for ``tokenize``.
        """
        return self._source_frame.inside(self.source(record.fields)[0]) + self.text(record.target or "")

    def text(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text behind another one, without special tokens."""
        return self._plain_target(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated or target ids, without special tokens and separator."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # The annotation of transformers allows a batch, which a flat list of ids never is.
        decoded = str(text)
        return decoded if self._continuation is None else self._continuation.text(decoded)

    def _frame_of_sources(self) -> SpecialFrame:
        frame = SpecialFrame.of(self.tokenizer)
        if self._chat is not None:
            frame = self._chat.frame
        elif not self.seq2seq:
            frame = SpecialFrame(frame.prefix, ())
        if self.placement is Placement.AFTER_BOS and not frame.prefix:
            raise ConfigError(
                "placement after_bos needs a tokenizer that starts texts with a token of its own, this one "
                "does not; use prefix"
            )
        return frame

    def _frame_of_targets(self) -> SpecialFrame:
        if self.chats is not None:
            return SpecialFrame((), self.chat_template.end)
        eos = self.tokenizer.eos_token_id
        end = () if eos is None else (int(eos),)
        if not self.seq2seq:
            return SpecialFrame((), end)
        frame = SpecialFrame.of(self.tokenizer, as_target=True)
        return frame if set(end) <= set(frame.suffix) else SpecialFrame(frame.prefix, end)

    def _check_limits(self) -> None:
        for option, limit, frame in (
            ("max_source_length", self.max_source_length, self._source_frame),
            ("max_target_length", self.max_target_length, self._target_frame),
        ):
            if limit <= len(frame):
                raise ConfigError(
                    f"expected {option} above {len(frame)}, the tokenizer's own special tokens, got {limit}"
                )
        own = len(self._ids(dict.fromkeys(self.verbalizer.fields, "")))
        if own > self.max_source_length:
            raise TemplateError(
                f"the verbalizer's own text takes {own} tokens, max_source_length is "
                f"{self.max_source_length}; raise it or shorten the verbalizer"
            )

    def _sources(self, all_fields: Sequence[Mapping[str, str]]) -> list[tuple[tuple[int, ...], int]]:
        framed = self._framed([self._text(fields) for fields in all_fields])
        sources = []
        for fields, ids in zip(all_fields, framed, strict=True):
            if len(ids) <= self.max_source_length:
                sources.append((ids, 0))
            else:
                kept = self._ids(cut_values(fields, self.verbalizer.fields, self._fits))
                sources.append((kept, len(ids) - len(kept)))
        return sources

    def _ids(self, fields: Mapping[str, str]) -> tuple[int, ...]:
        return self._framed([self._text(fields)])[0]

    def _fits(self, fields: Mapping[str, str]) -> bool:
        return len(self._ids(fields)) <= self.max_source_length

    def _text(self, fields: Mapping[str, str]) -> str:
        if self._marks.found or self._chat is not None:
            own = {
                name: self._marks.enclosed(fields[name])
                for name in self.verbalizer.fields
                if name in fields and (fields[name].strip() or name not in self.verbalizer.optional)
            }
            fields = {**fields, **own}
        rendered = self.verbalizer.render(fields)
        if self._continuation is None or self._chat is not None:
            return rendered
        # The separator before the target stands for the spaces.
        return self._marks.without_end(rendered) if self._marks.found else rendered.rstrip(" ")

    def _framed(self, texts: list[str]) -> list[tuple[int, ...]]:
        if self._chat is not None:  # printed whole, as the server prints it: a template may trim, a tokenizer join
            printed = [self._chat.printed(self.tokenizer, self._marks.without_edges(text)) for text in texts]
            ids = self._marks.ids([part for parts in printed for part in parts])
            return [before + behind for before, behind in zip(ids[::2], ids[1::2], strict=True)]
        if self._marks.found:
            plain = self._marks.ids(texts)
        else:
            plain = encode(self.tokenizer, texts, special=False, marks_are_text=True)
        return [self._source_frame.around(ids) for ids in plain]

    def _target(self, text: str | None) -> tuple[tuple[int, ...], int]:
        if text is None:
            return (), 0
        if text not in self._target_ids:
            self._target_ids[text] = self._plain_target(text)
        return self._ended(self._target_ids[text])

    def _ended(self, plain: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Return an answer cut to the limit, with its end, and how many of its tokens were lost."""
        room = self.max_target_length - len(self._target_frame)
        frame = self._target_frame
        return frame.prefix + plain[:room] + frame.suffix, max(0, len(plain) - room)

    def _plain_target(self, text: str) -> tuple[int, ...]:
        if self.chats is not None:
            answer = self.chat_template.row(chat_of("a").answered(text))[0][-1]
            return answer[: len(answer) - len(self._target_frame)]
        if self._continuation is not None:
            return self._continuation.ids(text)
        return encode(self.tokenizer, [text], special=False, as_target=True, marks_are_text=True)[0]

    def _check_chats(self) -> None:
        """Refuse chats where the base cannot have them, or the prompt would stand behind an answer."""
        if not self.tokenizer.chat_template or self.seq2seq:
            what = "is no causal model" if self.seq2seq else "has no chat template"
            raise ConfigError(f"the data is chats and this base model {what}; use a chat model, or name columns")
        if self.chats == "all" and self.placement is Placement.SUFFIX:
            raise ConfigError(
                "train_on all trains every answer, and with placement suffix the prompt stands before the last "
                "one; use another placement, or train_on last"
            )

    def _chat_row(self, record: Record, number: int) -> tuple[TokenRow, int, int]:
        """Return the row of a chat, the tokens that it lost, and the messages."""
        try:
            return self._row_of_chat(record)
        except (ConfigError, DataError) as error:
            raise DataError(f"record {number}: {error}") from error

    def _row_of_chat(self, record: Record) -> tuple[TokenRow, int, int]:
        chat = (record.chat or chat_of(record.fields[INPUT])).to_answer()
        if record.target is None:
            kept = fitted(chat, self._chat_fits)
            parts, loss = [self._opening(kept)], len(self._opening(chat)) - len(self._opening(kept))
        else:
            chat = kept = chat if record.chat else chat.answered(record.target)
            parts = self._parts(chat)
            before = sum(map(len, parts[:-1]))
            if before > self.max_source_length:
                question = fitted(replace(chat, messages=chat.messages[:-1]), self._chat_fits)
                kept = replace(question, messages=(*question.messages, chat.messages[-1]))
                parts = self._parts(kept)
            loss = before - sum(map(len, parts[:-1]))
        source, *rest = parts
        answer, lost = self._ended(rest[-1][: len(rest[-1]) - len(self._target_frame)]) if rest else ((), 0)
        target: list[int] = []
        unscored: list[int] = []
        for number, part in enumerate([*rest[:-1], answer]):
            if number % 2:  # between two answers
                unscored += range(len(target), len(target) + len(part))
            target += part
        cut = kept is not chat
        row = TokenRow(source, tuple(target), cut, bool(lost), self.offset(source), frozenset(unscored))
        return row, loss + lost, len(chat.messages) - len(kept.messages)

    def _chat_fits(self, chat: Chat) -> bool:
        return len(self._opening(chat)) <= self.max_source_length

    def _opening(self, chat: Chat) -> tuple[int, ...]:
        self.chat_template.check(chat)
        return self._placed(*self.chat_template.opening(chat))

    def _parts(self, chat: Chat) -> list[tuple[int, ...]]:
        self.chat_template.check(chat)
        (first, *rest), at = self.chat_template.row(chat, every=self.chats == "all")
        return [self._placed(first, at), *rest]

    def _placed(self, ids: tuple[int, ...], at: int) -> tuple[int, ...]:
        """Return the ids before an answer, refused where the prompt would stand elsewhere than in other rows."""
        if self._chat is not None and at != self._chat.at:
            raise ConfigError(
                "the chat template prints something of this chat, such as its tools, before the system turn's "
                "text, so the prompt would move; use placement prefix"
            )
        return ids
