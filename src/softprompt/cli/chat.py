"""``softprompt chat``: a conversation in the terminal, or with stdin as one user turn a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import click

from softprompt.cli.inputs import text_lines
from softprompt.cli.options import (
    Command,
    base_options,
    generation_options,
    given,
    load_prompts,
    option,
    parts_of,
    say,
    start_logging,
    write,
)
from softprompt.errors import SoftPromptError, UsageError, excerpt, in_options, nearest
from softprompt.generation import GenerationOptions

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.inference import Conversation, SpokenAnswer, TunedPrompt

BASE = "base"
"""What the base alone is called."""
_TOKENS = 256
_TURN_END = "\nUser:"
"""Begins the next turn where turns are plain lines."""
_COMMANDS = {
    "/system": "/system TEXT   set the system message; without TEXT there is none",
    "/reset": "/reset         forget the turns so far",
    "/prompt": "/prompt NAME   let another prompt answer, or the base; several names answer side by side",
    "/help": "/help          list these commands; a turn that begins with / is written with //",
    "/quit": "/quit          end, as Ctrl-D does; Ctrl-C stops an answer",
}


@click.command("chat", cls=Command)
@click.argument("prompt_dirs", nargs=-1)
@option("--system", group="Chat", help="System message.")
@option(
    "--compare", is_flag=True, group="Chat", help="The base and every prompt answer each turn, one below the other."
)
@option("--task-name", group="Chat", help="Task of the multitask prompts, by name or number.")
@option(
    "--max-new-tokens",
    type=int,
    group="Length and stopping",
    help=f"Maximum number of new tokens.  [default: {_TOKENS}, or a quarter of the context]",
)
@generation_options("max_new_tokens", "num_beams", "preserve_input_text")
@base_options
@option("--quiet", is_flag=True, group="Output", help="Show answers, warnings and errors only.")
def command(
    *,
    prompt_dirs: tuple[str, ...],
    system: str | None,
    compare: bool,
    max_new_tokens: int | None,
    quiet: bool,
    **options: Any,
) -> int:
    """Chat with a prompt, with several, or with a base model alone, in the terminal.

    Turns are rendered with the tokenizer's chat template, as the server's chat endpoint does. When a
    chat exceeds the model's context, its oldest turns are left out, and a line says so. Piped, each
    line of stdin is a turn. /help lists the commands.
    """
    task, most = options.pop("task_name"), _TOKENS if max_new_tokens is None else max_new_tokens
    chosen = parts_of(options, GenerationOptions)
    settings = GenerationOptions(**given(chosen), max_new_tokens=most)
    if not prompt_dirs and (compare or options["base_model"] is None):
        raise UsageError(
            "--compare needs a prompt to compare the base with; name its folder"
            if compare
            else "nobody to chat with: name the folder of a prompt, or a base model with --base-model"
        )
    start_logging(quiet=quiet)
    base, voices = _voices(prompt_dirs, options, task)
    from dataclasses import replace

    from softprompt.inference import Conversation

    if max_new_tokens is None:
        settings = replace(settings, max_new_tokens=min(most, (base.facts.context_length or _TOKENS * 4) // 4))
    if not base.tokenizer.chat_template:
        settings = replace(settings, stop_sequences=(*settings.stop_sequences, _TURN_END))
    with Conversation(base, voices, settings, system=system) as talk:
        asked = list(voices) if compare else list(voices)[:2][-1:]
        terminal = Terminal(talk, asked, settings.max_new_tokens, quiet=quiet)
        terminal.open(base.name)
        return terminal.run()


def _voices(
    prompt_dirs: Sequence[str], options: dict[str, Any], task: str | None
) -> tuple[Base, Mapping[str, TunedPrompt | None]]:
    """Load the prompts, or the base alone, and return the base and who may answer by name, the base first."""
    if not prompt_dirs:
        from softprompt.backbone import freeze, load_base

        base = load_base(options["base_model"], torch_dtype=options["torch_dtype"], device=options["device"])
        freeze(base.model)
        return base, {BASE: None}
    prompts = [each.of_task(task) for each in load_prompts(prompt_dirs, options)]
    short = [Path(each).resolve().name for each in prompt_dirs]
    names = [n if short.count(n) == 1 and n != BASE else d for n, d in zip(short, prompt_dirs, strict=True)]
    if len(set(names)) < len(names):
        raise UsageError("a prompt is named twice; name each once")
    return prompts[0].base, {BASE: None, **dict(zip(names, prompts, strict=True))}


@final
@dataclass(slots=True)
class Terminal:
    """The two ends of a conversation: turns read from stdin, answers written to stdout, remarks to stderr.

    Attributes:
        talk: The conversation.
        asked: The names of those who answer.
        most: Maximum number of new tokens of an answer.
        quiet: Whether remarks that are no errors are left out.
        failed: Whether a turn could not be answered.
    """

    talk: Conversation
    asked: list[str]
    most: int
    quiet: bool
    failed: bool = False

    @property
    def is_interactive(self) -> bool:
        """Whether a person types the turns."""
        return sys.stdin.isatty()

    def open(self, base_name: str) -> None:
        """Say what answers, and how."""
        if not self.talk.has_template:
            self._say(
                f"note: the tokenizer of {base_name} has no chat template; turns are written as plain lines, "
                "'User: ...' and 'Assistant: ...'"
            )
        for name, voice in self.talk.voices.items():
            if voice is not None and voice.labels is not None:
                self._say(f"note: {name} is a classifier; softprompt classify gives its labels with probabilities")
            elif voice is not None and self.talk.has_template:
                if not voice.manifest.is_of_chats(voice.rows.placement):
                    own = excerpt(voice.manifest.template)
                    self._say(
                        f"note: {name} records no training on chats, its template is {own!r}; generate uses that"
                    )
        if self.is_interactive:
            others = ", ".join(self.talk.voices)
            self._say(f"{' and '.join(self.asked)} of {others} on {base_name}; /help lists commands, Ctrl-D ends")

    def run(self) -> int:
        """SpokenAnswer turns until they end; return the exit code, 2 where a piped turn could not be answered."""
        for line in self._lines():
            text = line.strip()
            try:
                if text == "/quit":
                    break
                if text.startswith("/") and not text.startswith("//"):
                    self._command(text)
                elif text:
                    self._answer(text.removeprefix("/") if text.startswith("//") else text)
            except SoftPromptError as error:
                self.failed = True
                self._say(f"Error: {in_options(str(error))}", always=True)
        return 2 if self.failed and not self.is_interactive else 0

    def _lines(self) -> Iterator[str]:
        if not self.is_interactive:
            yield from text_lines()
            return
        import readline  # noqa: F401 - input() edits lines once it is imported

        while True:
            try:
                yield input("you> ")
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /quit ends)", always=True)

    def _answer(self, text: str) -> None:
        answers = self.talk.ask(text, self.asked)
        try:
            for each in answers:
                self._print(each)
        except KeyboardInterrupt:
            for each in answers:
                each.cancel()
            if not self.is_interactive:
                raise
            self._say("\n(stopped)", always=True)

    def _print(self, answer: SpokenAnswer) -> None:
        if answer.newly_left_out:
            without = f"answers without the oldest {answer.left_out} turns"
            self._say(f"note: the chat exceeds the model's context; {answer.name} {without}")
        if len(self.talk.voices) > 1 and (len(self.asked) > 1 or self.is_interactive):
            label = f"{answer.name}> "
            write(label)
        for piece in answer:
            write(piece)
        write("\n")
        if answer.is_cut:
            self._say(f"note: cut at {self.most} tokens; --max-new-tokens sets how many")

    def _command(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        match word:
            case "/system":
                self.talk.system = rest or None
                self._say("system message set" if rest else "no system message")
            case "/reset":
                self.talk.reset()
                self._say("the turns so far are forgotten")
            case "/prompt":
                self._choose(rest)
            case "/help":
                self._say("\n".join(_COMMANDS.values()), always=True)
            case _:
                raise UsageError(f"no command {word}{nearest(word, _COMMANDS)}; /help lists them")

    def _choose(self, rest: str) -> None:
        voices = self.talk.voices
        names = [rest] if rest in voices else rest.split()
        for name in names:
            if name not in voices:
                raise UsageError(f"no prompt {name!r}{nearest(name, voices)}; there are {', '.join(voices)}")
        self.asked = list(dict.fromkeys(names)) or self.asked
        self._say(f"{' and '.join(self.asked)} of {', '.join(voices)}", always=not names)

    def _say(self, message: str, *, always: bool = False) -> None:
        if always or not self.quiet:
            say(message)
