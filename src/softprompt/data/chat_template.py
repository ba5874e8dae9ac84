"""Chats to token ids by the tokenizer's own chat template, for training, answers, evaluation and the server alike.

``opening`` is what stands before an answer, ``row`` the same with the answer behind it. Answers are found by
comparing what the template prints with and without them, so that it needs no marks of its own, and a template
that prints a turn in another way once others follow it is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self, cast, final

from softprompt.data.chats import ROLES, Chat, chat_of
from softprompt.data.special_tokens import Marks, SpecialFrame, encode
from softprompt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEANINGFUL = ("name", "tool_calls", "function_call", "reasoning_content", "thinking")
"""What a message may have beside its text that a model would have to see."""
_SYSTEM, _USER, _ANSWER = "SYSTEMTURN", "USERTURN", "ANSWERTURN"
"""Stand-ins that a template prints as they are, to see what it puts around them."""


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """What a tokenizer's chat template puts around one user turn behind a system turn.

    Attributes:
        frame: The ids before and behind the user's text.
        at: Ids of the frame before the content of the system turn, where the prompt goes.
        tail: Text behind the user's, at the end of which the answer begins.
    """

    frame: SpecialFrame
    at: int
    tail: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Read the frame off the tokenizer's chat template.

        Raises:
            ConfigError: There is no template, or it has no system turn of its own.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                "placement chat_system needs a tokenizer with a chat template, this one has none; "
                "use prefix, or a chat model"
            )
        try:
            head, rest = cls.printed(tokenizer, _USER)
        except Exception as cause:  # templates raise what they like
            raise ConfigError(
                f"placement chat_system needs a chat template with a system turn, this one says: {cause}; "
                "use prefix"
            ) from cause
        middle, user, tail = rest.partition(_USER)
        if not user:
            raise ConfigError(
                "placement chat_system needs a chat template that prints the system turn before the user's; "
                "use prefix"
            )
        before, between, behind = encode(tokenizer, [head, middle, tail], special=False)
        return cls(SpecialFrame(before + between, behind), len(before), tail)

    @staticmethod
    def printed(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
        """Return what the template prints of a user's text, before and behind the content of the system turn."""
        turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]
        rendered = cast(Any, tokenizer).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head, _, rest = str(rendered).partition(_SYSTEM)
        return head, rest


@final
class ChatTemplate:
    """A tokenizer's chat template.

    Special tokens come from the template alone; what looks like one in a message stays text.

    Attributes:
        in_system: Whether a prompt stands in the system turn, before that turn's own text.
        marks: The special tokens of the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, in_system: bool = False) -> None:
        self.in_system = in_system
        self._tokenizer = tokenizer
        self._source = str(tokenizer.chat_template or "")
        self.marks = Marks(tokenizer, [self._source])

    def opening(self, chat: Chat) -> tuple[tuple[int, ...], int]:
        """Return the ids before an answer, and how many of them stand before a prompt in the system turn.

        Raises:
            ConfigError: There is no chat template, or it refuses these messages.
        """
        head, (text,) = self._split([self._printed(chat, answered=False)])
        return head + self.marks.ids([text])[0], len(head)

    def row(self, chat: Chat, *, every: bool = False) -> tuple[list[tuple[int, ...]], int]:
        """Return the ids of a chat that ends in an answer, split where answers begin and end; and as ``opening``.

        Args:
            chat: The chat.
            every: Split at every answer, not at the last alone.

        Raises:
            ConfigError: As ``opening``.
            DataError: The template prints a turn in another way once others follow it.
        """
        last = len(chat.messages) - 1
        numbers = [i for i, each in enumerate(chat.messages) if each["role"] == "assistant" and i >= chat.given]
        end, tail, _ = self._turn_end
        printed: list[str] = []
        for i in numbers if every else [last]:
            printed.append(self._printed(replace(chat, messages=chat.messages[:i]), answered=False))
            whole = self._printed(replace(chat, messages=chat.messages[: i + 1]), answered=True)
            printed.append(whole.removesuffix(tail) if whole.endswith(end + tail) else whole.rstrip())
        for before, after in pairwise(printed):
            if not after.startswith(before):
                raise DataError(_changed(before, after, every=len(numbers) > 1 and every))
        head, texts = self._split(printed)
        parts = self._pieces(texts)
        parts[0] = head + parts[0]
        if not end:
            parts[-1] += self.end
        return parts, len(head)

    @property
    def end(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        eos = self._tokenizer.eos_token_id
        return self._turn_end[2] or (() if eos is None else (int(eos),))

    @cached_property
    def _turn_end(self) -> tuple[str, str, tuple[int, ...]]:
        """What ends an answer within a chat, what follows it at a chat's end, and the ids of the former.

        Only a special token ends an answer; where the template has none, the tokenizer's end token does.
        """
        asked = chat_of(_USER).answered(_ANSWER)
        more = replace(asked, messages=(*asked.messages, *chat_of(_USER).messages))
        one, other = (self._printed(each, answered=True).rpartition(_ANSWER)[2] for each in (asked, more))
        at = max((end for end in self.marks.ends(one) if other.startswith(one[:end])), default=0)
        return one[:at], one[at:], self.marks.ids([one[:at]])[0]

    def check(self, chat: Chat) -> None:
        """Raise ``DataError`` for what a message has and the template does not print."""
        had = {name for message in chat.messages for name in message} | ({"tools"} if chat.tools else set())
        for name in ("tools", *_MEANINGFUL):
            if name in had and name not in self._source:
                raise DataError(
                    f"a chat has {name!r}, which the base model's chat template does not print; leave it out of "
                    "the data, or use a model whose template does"
                )

    def _printed(self, chat: Chat, *, answered: bool) -> str:
        if not self._source:
            raise ConfigError("this base model has no chat template; send a text, or use a chat model")
        messages = [self._hidden(message) for message in chat.messages]
        if self.in_system:
            own = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
            messages.insert(0, {"role": "system", "content": _SYSTEM + own})
        more = {} if chat.tools is None else {"tools": self._hide(chat.tools)}
        render = cast(Any, self._tokenizer).apply_chat_template
        try:
            return str(render(messages, tokenize=False, add_generation_prompt=not answered, **more))
        except Exception as cause:  # templates raise any exception
            first = (str(cause).splitlines() or [type(cause).__name__])[0]
            raise ConfigError(f"the chat template refuses these messages: {first}") from cause

    def _hidden(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message whose text the template cannot take for its own special tokens."""
        role = message["role"]
        if role not in ROLES and self.marks.spells(role):
            raise ConfigError(f"the role {role!r} would be read as a special token; choose another")
        # Templates take the reasoning out of earlier answers by its tags.
        own = role == "assistant"
        return {"role": role} | {n: self._hide(v, special_only=own) for n, v in message.items() if n != "role"}

    def _hide(self, value: Any, *, special_only: bool = False) -> Any:
        if isinstance(value, str):
            return self.marks.hide(value, special_only=special_only)
        if isinstance(value, Mapping):
            return {name: self._hide(each, special_only=special_only) for name, each in value.items()}
        return [self._hide(each, special_only=special_only) for each in value] if isinstance(value, list) else value

    def _split(self, printed: list[str]) -> tuple[tuple[int, ...], list[str]]:
        """Return the ids before a prompt in the system turn, and the texts behind it."""
        if not self.in_system:
            return (), printed
        parts = [text.partition(_SYSTEM) for text in printed]
        if not all(found for _, found, _ in parts):
            raise ConfigError("the chat template of this base model prints no system turn")
        return self.marks.ids([parts[0][0]])[0], [text for _, _, text in parts]

    def _pieces(self, printed: list[str]) -> list[tuple[int, ...]]:
        """Return the ids of growing texts, each from the end of the one before."""
        found = self.marks.ids(printed)
        whole, ends = found[-1], [len(ids) for ids in found]
        if all(whole[: len(ids)] == ids for ids in found):
            return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        # A token would reach over a border, where generation begins anew: each part by itself.
        texts = [after.removeprefix(before) for before, after in zip(["", *printed], printed, strict=False)]
        return self.marks.ids(texts)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special token that ends an answer in a tokenizer's chat template, if there is one."""
    try:
        return ChatTemplate(tokenizer).end[-1:] if tokenizer.chat_template else ()
    except ConfigError:  # a template that has no turns of these roles
        return ()


def _changed(before: str, after: str, *, every: bool) -> str:
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    advice = "train the last answer alone (train_on last)" if every else "name columns for a plain template"
    return (
        f"the chat template prints turns in another way once others follow them ({before[at : at + 30]!r} becomes "
        f"{after[at : at + 30]!r}), so training would show what answering never sees; {advice}"
    )
