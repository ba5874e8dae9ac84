"""A loaded prompt: its value, and how a client's text, fields or ids become its input tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from softprompt.data import RowTokenizer, SpecialFrame, Verbalizer, encode
from softprompt.errors import ConfigError, DataError, TemplateError
from softprompt.generation import Input
from softprompt.inference import given_of
from softprompt.prompts import Placement

if TYPE_CHECKING:
    from softprompt.artifacts import Manifest
    from softprompt.backbone import Base
    from softprompt.inference import Fields, TunedPrompt
    from softprompt.prompts import Prompt

_LENGTH = 128
"""Maximum tokens of a label without a prompt."""
CUT = (
    "the input takes more than the {limit:,} tokens that the prompt {name!r} was trained with; shorten it, or "
    "send truncate_input=true to lose its end"
)


class PlainText:
    """Plain tokenization for the base model, with its leading special tokens and no template.

    Attributes:
        base: The base model.
        tokenizer: Its tokenizer.
        answers: Tokenizes labels for the base model alone.
        frame: Its special tokens around an input.
    """

    def __init__(self, base: Base, *, seq2seq: bool) -> None:
        self.base = base
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

    def ids(self, text: str, *, raw: bool = False) -> tuple[int, ...]:
        """Return the ids of a text; only in a ``raw`` one special tokens are read as such."""
        return self.frame.around(encode(self.tokenizer, [text], special=False, marks_are_text=not raw)[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True)
class Served:
    """One version of a prompt for one of its tasks, or the base alone.

    Attributes:
        name: Its name in requests (``model``).
        version: Content hash of its files.
        plain: Tokenization without a template.
        own: The prompt with its record; None for the base model alone.
        chat: Whether the chat template puts its inputs as in training; None is unknown, or the base alone.
    """

    name: str
    version: str
    plain: PlainText
    own: TunedPrompt | None = None
    chat: bool | None = None

    @property
    def prompt(self) -> Prompt | None:
        """What requests carry; None is the base alone."""
        return self.own.prompt() if self.own else None

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
        """The label set of its record."""
        return self.manifest.labels if self.manifest else None

    def of_fields(self, request: Fields, *, truncate: bool = False) -> Input:
        """Render a text or fields with the prompt's template and return the tokens.

        Raises:
            TemplateError: The fields are not the template's.
            DataError: It is empty, or longer than the prompt's limit and ``truncate`` is false.
        """
        if self.rows is None:
            if not isinstance(request, str):
                raise DataError("the base model has no template; send its text as prompt")
            return self.of_text(request)
        verbalizer = self.rows.verbalizer
        names = [name for name in verbalizer.fields if name not in verbalizer.optional]
        if isinstance(request, str) and len(names) > 1:
            own = ", ".join(f'"{field}": "..."' for field in names)
            raise TemplateError(
                f"the template of {self.name!r} has several fields, so one text is not enough; "
                f"send fields {{{own}}} instead"
            )
        ids, cut = self.rows.source(given_of(request, self.rows))
        if cut and not truncate:
            raise DataError(CUT.format(limit=self.rows.max_source_length, name=self.name))
        return Input(ids, self.rows.offset(ids), self.rows.decode, cut)

    def of_text(self, text: str, *, raw: bool = False) -> Input:
        """Return the input of a text without a template; a ``raw`` one is the client's own template."""
        return self.of_ids(self.plain.ids(text, raw=raw))

    def of_ids(self, ids: Sequence[int]) -> Input:
        """Return the input of token ids.

        Raises:
            ConfigError: The prompt's placement is a chat's system turn, which bare ids do not show.
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
