"""A chat of several turns with prompts and their base: its history, and what is left out once it is too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from softprompt.data import Chat, ChatTemplate, SpecialFrame, encode
from softprompt.errors import ConfigError, ContextOverflowError
from softprompt.generation import (
    Batcher,
    Bounds,
    FinishEvent,
    GenerationOptions,
    Input,
    Request,
    Ticket,
    TokenEvent,
)

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.inference.tuned import TunedPrompt

Message = Mapping[str, str]
"""``role`` and ``content``, as chat templates take them."""

_UNBOUNDED = 2**62


@dataclass(slots=True)
class Turn:
    """What the user said, and what each of those who were asked answered."""

    text: str
    answers: dict[str, str] = field(default_factory=dict)


@final
class SpokenAnswer:
    """One answer to a turn: iterating gives its text piece by piece, and writes it into the turn's history.

    Attributes:
        name: Who answers.
        left_out: How many of the oldest turns it does not see, because they did not fit.
        newly_left_out: How many of those the voice saw at the turn before.
        is_cut: Whether it ended at ``max_new_tokens``; known at the end.
    """

    def __init__(self, name: str, ticket: Ticket, turn: Turn, *, left_out: int, before: int) -> None:
        self.name = name
        self.left_out = left_out
        self.newly_left_out = left_out - before
        self.is_cut = False
        self._ticket = ticket
        self._turn = turn

    def __iter__(self) -> Iterator[str]:
        """Yield pieces; leaving early keeps what was yielded."""
        self._turn.answers[self.name] = ""
        try:
            for event in self._ticket:
                if isinstance(event, TokenEvent) and event.text:
                    self._turn.answers[self.name] += event.text
                    yield event.text
                elif isinstance(event, FinishEvent):
                    self.is_cut = event.reason == "length"
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop it."""
        self._ticket.cancel()


@final
class Conversation(AbstractContextManager["Conversation"]):
    """Turns of a chat that prompts of one base, or the base alone, answer with the tokenizer's chat template.

    Each sees its own earlier answers; one that was not asked earlier sees those of who was. When a chat exceeds the
    model's context, the oldest turns are left out. A tokenizer without a chat template has the turns written as
    lines, ``User: ...`` and ``Assistant: ...``.

    Args:
        base: The base.
        voices: Who may answer, by name: prompts of that base, or None for the base alone.
        options: How to generate.
        system: The system message.
    """

    def __init__(
        self,
        base: Base,
        voices: Mapping[str, TunedPrompt | None],
        options: GenerationOptions,
        *,
        system: str | None = None,
    ) -> None:
        for each in voices.values():
            if each is not None:
                each.check_served()
        self.voices = dict(voices)
        self.system = system
        self.has_template = bool(base.tokenizer.chat_template)
        self._tokenizer: Any = base.tokenizer
        self._options = options
        self._turns: list[Turn] = []
        self._left_out = dict.fromkeys(voices, 0)
        bounds = Bounds(max_batch_rows=max(1, len(voices)), max_cached_tokens=_UNBOUNDED, ordered_weights=False)
        self._batcher = Batcher(base, bounds)

    def ask(self, text: str, names: Sequence[str]) -> list[SpokenAnswer]:
        """Return the answers of some voices to one more turn, which run at the same time.

        Raises:
            SoftPromptError: The turn cannot be answered, for one because it alone exceeds the context; then the
                history is as before.
        """
        turn, found = Turn(text), list[SpokenAnswer]()
        self._turns.append(turn)
        try:
            for name in names:
                found.append(self._asked(name, turn))
        except BaseException:
            for each in found:
                each.cancel()
            self._turns.pop()
            raise
        return found

    def reset(self) -> None:
        """Forget all turns."""
        self._turns.clear()
        self._left_out = dict.fromkeys(self.voices, 0)

    def input_of(self, name: str) -> Input:
        """Return the tokens that one voice answers now, without the turns it leaves out."""
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = self._turns[self._left_out[name] :]
        for turn in turns:
            messages.append({"role": "user", "content": turn.text})
            if turn is not turns[-1]:
                answer = turn.answers.get(name) or next(filter(None, turn.answers.values()), "")
                messages.append({"role": "assistant", "content": answer})
        return self._input(messages, self.voices[name])

    def __exit__(self, *_: object) -> None:
        """Cancel what runs and stop."""
        self._batcher.stop()

    def _asked(self, name: str, turn: Turn) -> SpokenAnswer:
        voice = self.voices[name]
        before = self._left_out[name]
        while True:
            request = Request.of(
                self.input_of(name), None if voice is None else voice.prompt(), options=self._options
            )
            try:
                ticket = self._batcher.submit(request)
                return SpokenAnswer(name, ticket, turn, left_out=self._left_out[name], before=before)
            except ContextOverflowError:
                if self._left_out[name] + 1 >= len(self._turns):
                    self._left_out[name] = before
                    raise
                self._left_out[name] += 1

    def _input(self, messages: Sequence[Message], voice: TunedPrompt | None) -> Input:
        placement = "prefix" if voice is None else str(voice.rows.placement)
        first = SpecialFrame.of(self._tokenizer).prefix
        if self.has_template:
            in_system = placement == "chat_system"
            if in_system and voice and voice.rows.chats is None and messages[0]["role"] == "system":
                raise ConfigError("the prompt stands in the system turn; leave the system message out")
            ids, at = ChatTemplate(self._tokenizer, in_system=in_system).opening(Chat(tuple(messages)))
        else:
            lines = [f"{each['role'].capitalize()}: {each['content']}\n" for each in messages]
            text = "".join([*lines, "Assistant:"])
            ids, at = first + encode(self._tokenizer, [text], special=False, marks_are_text=True)[0], 0
        if placement == "suffix":
            at = len(ids)
        elif placement == "after_bos" and ids[: len(first)] == first:
            at = len(first)
        return Input(ids, at, self._decode)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text) if self.has_template else str(text).removeprefix(" ")
