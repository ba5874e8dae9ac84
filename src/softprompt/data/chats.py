"""Chats as people have them: messages, ShareGPT's conversations, prompts and completions, Alpaca's instructions."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from softprompt.errors import DataError, nearest
from softprompt.untrusted import MOST_CHARACTERS

CHAT_COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""Columns by which chats, and instructions that can be one, are recognised."""
CHAT_FIELDS = ("prompt", "instruction", "input", "system")
"""Columns of texts that a chat is made of."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that templates write in brackets."""
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


class ChatMessage(TypedDict):
    """One message of a chat, for type checkers; what else a template prints may be there too."""

    role: str
    content: Any


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of a chat, as chat templates take them.

    Attributes:
        messages: Mappings with ``role`` and ``content``, and what else a template may print.
        tools: The tools that the model may call, as the template takes them.
        given: Messages at the start that no answer is trained in, as those of a ``prompt`` column.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: Sequence[Any] | None = None
    given: int = 0

    @property
    def answers(self) -> int:
        """How many answers may be trained."""
        return sum(each["role"] == "assistant" for each in self.messages[self.given :])

    @property
    def answer(self) -> str | None:
        """The text of the last answer; None where the chat has none."""
        for each in reversed(self.messages[self.given :]):
            if each["role"] == "assistant":
                calls = each.get("tool_calls")
                return json.dumps(calls) if calls and not each["content"] else str(each["content"])
        return None

    def to_answer(self) -> Chat:
        """Return the chat up to its last answer, or all of it where it has none."""
        end = len(self.messages)
        while self.answer is not None and self.messages[end - 1]["role"] != "assistant":
            end -= 1
        return replace(self, messages=self.messages[:end])

    def asked(self) -> Chat:
        """Return the chat before its last answer, or all of it where it has none."""
        whole = self.to_answer()
        return self if self.answer is None else replace(whole, messages=whole.messages[:-1])

    def answered(self, text: str) -> Chat:
        """Return the chat with an answer behind it."""
        return replace(self, messages=(*self.messages, {"role": "assistant", "content": text}))


def check_length(text: str, what: str, where: str) -> None:
    """Refuse a text that no context holds, and a tokenizer takes minutes for; raises DataError."""
    if len(text) > MOST_CHARACTERS:
        raise DataError(
            f"{where}: {what} has {len(text):,} characters, and at most {MOST_CHARACTERS:,} are read; cut it"
        )


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages, rather than of texts or fields."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(each, Mapping) and ({"role", "content"} <= {*each} or "from" in each) for each in value)
    )


def chat_of(given: Any, where: str = "the input", columns: Sequence[str] | None = None) -> Chat:
    """Return the chat of a text (one user turn), of a list of messages, or of a record or a request with fields.

    Args:
        given: Any of these.
        where: What an error calls it.
        columns: Columns of the chat; None finds them.

    Raises:
        DataError: It is no chat, or a message is not as expected.
    """
    if isinstance(given, str):
        return Chat(_messages(given, where))
    if not isinstance(given, Mapping):
        return Chat(_messages(given, where))
    columns = columns or next((each for each in CHAT_COLUMNS if each[0] in given), ("input",))
    if columns[0] == "instruction":
        extra = given.get("input")
        asked = _text(given, "instruction", where) + (f"\n\n{extra}" if extra and str(extra).strip() else "")
        messages = _messages(asked, where)
    else:
        name = "text" if columns[0] not in given and "text" in given else columns[0]
        messages = _messages(_listed(given.get(name), name, where), where)
    if given.get("system") and messages[0]["role"] != "system":
        messages = (*_messages(_text(given, "system", where), where, "system"), *messages)
    before = 0
    if len(columns) > 1 and given.get(columns[1]) is not None:
        before = len(messages)
        messages += _messages(_listed(given[columns[1]], columns[1], where), where, "assistant")
    tools = given.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected a list of tools as JSON in 'tools', got {tools[:40]!r}") from error
    return Chat(messages, tools or None, before)


def _text(given: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(given.get(name), str) or not given[name].strip():
        raise DataError(f"{where}: expected text in the field {name!r}, got {given.get(name)!r}")
    return str(given[name])


def _listed(value: Any, name: str, where: str) -> Any:
    """Return a text or a list of messages; a table's cell holds the list as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = found if is_chat(found := json.loads(value)) else value
    if value is None or (not isinstance(value, str) and hasattr(value, "__len__") and not len(value)):
        raise DataError(f"{where}: expected messages in the field {name!r}, got {value!r}")
    return value


def _messages(value: Any, where: str, role: str = "user") -> tuple[Mapping[str, Any], ...]:
    """Return a text as one message of a role, or a list of messages as templates take them."""
    if isinstance(value, str):
        check_length(value, "a message", where)
        return ({"role": role, "content": value},)
    if isinstance(value, Mapping) or not hasattr(value, "__iter__"):
        raise DataError(
            f"{where}: expected a text or a list of messages such as {{'role': 'user', 'content': '...'}}, "
            f"got {type(value).__name__}"
        )
    return tuple(_message(each, f"{where}, message {number}") for number, each in enumerate(value, start=1))


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: expected 'role' and 'content', got {type(given).__name__}")
    names = ("from", "value") if "from" in given else ("role", "content")
    needed = names[:1] if given.get("tool_calls") else names
    if absent := [name for name in needed if name not in given]:
        raise DataError(
            f"{where}: expected the fields {names[0]!r} and {names[1]!r}, got {', '.join(given)}"
            f"{nearest(absent[0], given)}"
        )
    role, content = str(given[names[0]]), given.get(names[1])
    if names[0] == "from":
        role = _SHAREGPT.get(role, role)
        if role not in ROLES:
            raise DataError(f"{where}: expected from human, gpt, system or tool, got {role!r}")
    if isinstance(content, list | tuple):
        if others := {_kind(part): None for part in content if _kind(part) != "text"}:
            raise DataError(f"{where}: expected parts of type text, got {', '.join(others)}")
        content = "".join(str(part.get("text", "")) for part in content)
    more = {name: value for name, value in given.items() if name not in names and value}
    if content is None and "tool_calls" in more:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where}: expected text in {names[1]!r}, got {content!r}")
    check_length(content, repr(names[1]), where)
    return {"role": role, "content": content, **more}


def _kind(part: Any) -> str:
    """Return the type of a part of a message; of what is none, the name of its class."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return kind if isinstance(kind, str) else type(part).__name__


def fitted(chat: Chat, fits: Callable[[Chat], bool]) -> Chat:
    """Return a chat without its oldest turns, and with its last question cut, as far as it does not fit.

    The system turn stays. Turns go up to the next question, so that a chat always begins with one.

    Raises:
        DataError: It does not fit without a question either.
    """
    first = int(chat.messages[0]["role"] in ("system", "developer"))
    starts = [i for i, each in enumerate(chat.messages) if i > first and each["role"] == "user"]
    shorter = [chat, *(_without(chat, first, start) for start in starts)]
    found = bisect_left(shorter, x=True, key=fits)
    if found < len(shorter):
        return shorter[found]
    last = shorter[-1]
    at = max((i for i, each in enumerate(last.messages) if each["role"] == "user"), default=-1)
    text = last.messages[at]["content"]
    # The longest beginning that fits: none of it surely does, or nothing is left to cut.
    kept = bisect_left(range(len(text) + 1), x=True, key=lambda count: not fits(_cut(last, at, count)))
    if not kept or at < 0:
        raise DataError("a chat's system turn and template alone are longer than max_source_length; raise it")
    return _cut(last, at, kept - 1)


def _without(chat: Chat, start: int, end: int) -> Chat:
    messages = (*chat.messages[:start], *chat.messages[end:])
    return replace(chat, messages=messages, given=max(0, chat.given - (end - start)))


def _cut(chat: Chat, at: int, characters: int) -> Chat:
    # A space left hanging at the cut would become a token of its own.
    message = {**chat.messages[at], "content": chat.messages[at]["content"][:characters].rstrip()}
    return replace(chat, messages=(*chat.messages[:at], message, *chat.messages[at + 1 :]))
