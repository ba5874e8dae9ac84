"""A prompt in service, and how a client's input becomes the ids before an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from softprompt.artifacts import Manifest
from softprompt.backbone import Base
from softprompt.data import RowTokenizer, SpecialFrame, Verbalizer, encode
from softprompt.errors import ConfigError, DataError, TemplateError
from softprompt.inference import DetachedTask, Input, fields_of, label_ids_of
from softprompt.inference.requests import Request as Fields
from softprompt.prompts import Placement, Prompt

_LENGTH = 128
"""Most tokens of a label of the base."""
CUT = (
    "the input takes more than the {limit:,} tokens that the prompt {name!r} was trained with; shorten it, or "
    "send truncate_input=true to lose its end"
)


class PlainText:
    """Texts as the base reads them, with the special tokens it puts in front.

    Attributes:
        answers: How labels become tokens where no prompt says so.
    """

    def __init__(self, base: Base, *, seq2seq: bool) -> None:
        self.tokenizer: PreTrainedTokenizerBase = base.tokenizer
        self.answers = RowTokenizer(
            base.tokenizer,
            Verbalizer("{{input}}"),
            max_source_length=_LENGTH,
            max_target_length=_LENGTH,
            seq2seq=seq2seq,
        )
        frame = SpecialFrame.of(base.tokenizer)
        self.frame = frame if seq2seq else SpecialFrame(frame.prefix, ())

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text; special tokens written in it are taken as such."""
        return self.frame.around(self.bare_ids([text])[0])

    def bare_ids(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Return the ids of texts with nothing put around them."""
        return encode(self.tokenizer, texts, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


@dataclass(frozen=True, slots=True)
class Served:
    """One version of a prompt for one of its tasks, or the base alone.

    Attributes:
        name: What clients call it.
        version: Changes with the files' content.
        plain: How the base reads texts.
        own: The prompt with its record; None is the base alone.
    """

    name: str
    version: str
    plain: PlainText
    own: DetachedTask | None = None

    @property
    def prompt(self) -> Prompt | None:
        """What requests carry; None is the base alone."""
        return self.own.prompt if self.own else None

    @property
    def rows(self) -> RowTokenizer | None:
        """What turns the prompt's fields into token ids; None is the base alone."""
        return self.own.rows if self.own else None

    @property
    def manifest(self) -> Manifest | None:
        """The prompt's record; None is the base alone."""
        return self.own.manifest if self.own else None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The label set on record."""
        return self.manifest.labels if self.manifest else None

    def of_fields(self, request: Fields, *, truncate: bool = False) -> Input:
        """Return the input that the prompt's template makes of a text or of fields.

        Raises:
            TemplateError: The fields are not the template's.
            DataError: It is empty, or longer than the prompt's limit and not to be cut.
        """
        if self.rows is None:
            if not isinstance(request, str):
                raise DataError("the base model has no template; send its text as prompt")
            return self.of_text(request)
        names = self.rows.verbalizer.fields
        if isinstance(request, str) and len(names) > 1:
            own = ", ".join(f'"{field}": "..."' for field in names)
            raise TemplateError(
                f"the template of {self.name!r} has several fields, so one text is not enough; "
                f"send fields {{{own}}} instead"
            )
        fields = fields_of(request, names)
        ids, cut = self.rows.source(fields)
        if cut and not truncate:
            raise DataError(CUT.format(limit=self.rows.max_source_length, name=self.name))
        return Input(ids, self.rows.offset(ids), self.rows.decode, cut)

    def label_ids(self, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the tokens of labels as answers of this prompt, or as the base would write them.

        Raises:
            ConfigError: There is none, or two have the same tokens.
            DataError: One is longer than the prompt's answers may be.
        """
        return label_ids_of(self.rows or self.plain.answers, labels)

    def of_text(self, text: str) -> Input:
        """Return the input that a text is without a template."""
        return self.of_ids(self.plain.ids(text))

    def of_ids(self, ids: Sequence[int]) -> Input:
        """Return the input that token ids are.

        Raises:
            ConfigError: The prompt stands in a chat's system turn, which bare ids do not show.
        """
        given = tuple(ids)
        return Input(given, self._at(given), self.plain.decode)

    def _at(self, ids: tuple[int, ...]) -> int:
        match self.rows.placement if self.rows is not None else Placement.PREFIX:
            case Placement.SUFFIX:
                return len(ids)
            case Placement.AFTER_BOS:
                first = self.plain.frame.prefix
                return len(first) if ids[: len(first)] == first else 0
            case Placement.CHAT_SYSTEM:
                raise ConfigError(
                    f"the prompt {self.name!r} stands in the system turn of a chat; send a text, or messages to "
                    "/v1/chat/completions"
                )
        return 0


def chat_input(served: Served, messages: Sequence[Mapping[str, Any]]) -> Input:
    """Return the input that the tokenizer's chat template makes of messages.

    Raises:
        ConfigError: There is no chat template, or the messages do not suit it or the prompt.
    """
    tokenizer: Any = served.plain.tokenizer
    if not tokenizer.chat_template:
        raise ConfigError("this base model has no chat template; send the text to /v1/completions")
    in_system = served.rows is not None and served.rows.placement is Placement.CHAT_SYSTEM
    if in_system:
        if messages[0]["role"] == "system":
            raise ConfigError(
                f"the prompt {served.name!r} stands in the system turn; leave the system message out"
            )
        messages = [{"role": "system", "content": _STAND_IN}, *messages]
    try:
        text = str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as cause:  # templates raise what they like
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ConfigError(f"the chat template refuses these messages: {first}") from cause
    if not in_system:
        return served.of_ids(served.plain.bare_ids([text])[0])
    head, found, tail = text.partition(_STAND_IN)
    if not found:
        raise ConfigError("the chat template of this base model prints no system turn")
    before, behind = served.plain.bare_ids([head, tail])
    return Input(before + behind, len(before), served.plain.decode)


_STAND_IN = "SYSTEMTURN"
"""Stands where the prompt goes while the template is rendered, as in training."""
