"""Many prompts of one base, answering together: the Python face of the batcher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from transformers import PreTrainedModel

from softprompt.errors import AdapterError, ConfigError, nearest
from softprompt.inference.continuous.batcher import Batcher
from softprompt.inference.continuous.events import FinishEvent
from softprompt.inference.continuous.request import Bounds
from softprompt.inference.continuous.streaming import async_pieces, pieces
from softprompt.inference.continuous.ticket import Ticket
from softprompt.inference.continuous.values import request_of
from softprompt.inference.detached import DetachedPrompt
from softprompt.inference.generation import Generation
from softprompt.inference.loading import load_detached
from softprompt.inference.options import GenerationOptions, options_from
from softprompt.inference.requests import Request, listed, sources_of
from softprompt.inference.task_choice import Task
from softprompt.inference.tuned import TunedPrompt


@final
class Serving:
    """Prompts of one base model that answer many inputs at once, each equal to its answer alone.

    Any thread may ask. Closing it, also at the end of a ``with`` block, cancels what runs.

    Args:
        prompts: The prompts by the names to ask for them by, at least one, all on one base.
        bounds: What may be used at most.

    Raises:
        ConfigError: There is no prompt, or they have different bases.
    """

    def __init__(
        self, prompts: Mapping[str, TunedPrompt | DetachedPrompt], bounds: Bounds | None = None
    ) -> None:
        if not prompts:
            raise ConfigError("serving expects at least one prompt, got none; name one")
        first = next(iter(prompts.values()))
        self._base = _detached(first).model
        self._prompts: dict[str, DetachedPrompt] = {}
        for name, tuned in prompts.items():
            self.put(name, tuned)
        self.batcher = Batcher(self._base, first.tokenizer, bounds)

    @classmethod
    def load(
        cls,
        prompts: Mapping[str, str | Path],
        base_model: str | Path | PreTrainedModel | None = None,
        *,
        bounds: Bounds | None = None,
        **loading: Any,
    ) -> Self:
        """Load prompts of any kinds from their folders, or from the Hub, with their base.

        Args:
            prompts: Folders by the names to ask for them by.
            base_model: As for ``softprompt.load``.
            bounds: What may be used at most.
            **loading: Further arguments of ``softprompt.load``.

        Raises:
            SoftPromptError: As ``softprompt.load``.
        """
        loaded = load_detached(list(prompts.values()), base_model, **loading)
        return cls(dict(zip(prompts, loaded, strict=True)), bounds)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The names of the prompts."""
        return tuple(self._prompts)

    def put(self, name: str, prompt: TunedPrompt | DetachedPrompt) -> None:
        """Serve a prompt's value of now under a name; requests that run keep the one they began with.

        Raises:
            ConfigError: It is on another base, or has a head of its own.
        """
        detached = _detached(prompt)
        if detached.model is not self._base:
            raise ConfigError(
                f"prompt {name!r} is on another base model; load it onto the same one"
            )
        self._prompts[name] = detached

    def submit(
        self,
        request: Request,
        prompt: str,
        options: GenerationOptions,
        *,
        task_name: Task | None = None,
        **more: Any,
    ) -> Ticket:
        """Ask for an answer and return at once; ``more`` are fields of a batcher's request (``n``, ``logprobs``).

        Raises:
            SoftPromptError: There is no such prompt or task, the input does not fit it, or the queue is full.
        """
        own = self._known(prompt).of_task(task_name)
        (ids,), _ = sources_of(own.rows, [request])
        return self.batcher.submit(request_of(own.rows, own.value, ids, options=options, **more))

    def generate(
        self,
        requests: Request | Iterable[Request],
        prompts: str | Sequence[str],
        *,
        task_name: Task | Sequence[Task | None] | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> list[Generation]:
        """Return one answer for each input.

        Args:
            requests: One input or several: texts, or mappings of the template's fields.
            prompts: The name of the prompt of each input, or one for all.
            task_name: The task of multitask prompts, by name or number; or one for each input, None
                where its prompt has one.
            options: How to generate; or name its fields as ``settings``.
            **settings: Fields of ``GenerationOptions``.

        Raises:
            SoftPromptError: As ``submit``.
        """
        chosen = options_from(options, settings, "generate")
        tickets = self._submitted(requests, prompts, task_name, chosen)
        try:
            return [_generation(ticket.result()[0], cut) for ticket, cut in tickets]
        finally:
            for ticket, _ in tickets:
                ticket.cancel()

    async def agenerate(
        self,
        requests: Request | Iterable[Request],
        prompts: str | Sequence[str],
        *,
        task_name: Task | Sequence[Task | None] | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> list[Generation]:
        """Answer as ``generate``, without blocking the event loop."""
        chosen = options_from(options, settings, "agenerate")
        # It waits while the queue is full.
        tickets = await asyncio.to_thread(self._submitted, requests, prompts, task_name, chosen)
        try:
            ends = await asyncio.gather(*(ticket for ticket, _ in tickets))
        finally:
            for ticket, _ in tickets:
                ticket.cancel()
        return [_generation(end[0], cut) for end, (_, cut) in zip(ends, tickets, strict=True)]

    def stream(
        self,
        request: Request,
        prompt: str,
        *,
        task_name: Task | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yield the answer to one input piece by piece; dropping the iterator cancels it."""
        chosen = options_from(options, settings, "stream")
        return pieces(self.submit(request, prompt, chosen, task_name=task_name))

    def astream(
        self,
        request: Request,
        prompt: str,
        *,
        task_name: Task | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> AsyncIterator[str]:
        """Yield as ``stream``, without blocking the event loop."""
        chosen = options_from(options, settings, "astream")
        return async_pieces(self.submit(request, prompt, chosen, task_name=task_name))

    def close(self) -> None:
        """Cancel what runs and stop."""
        self.batcher.stop()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _known(self, name: str) -> DetachedPrompt:
        if name not in self._prompts:
            known = ", ".join(self._prompts)
            raise AdapterError(
                f"there is no prompt {name!r}{nearest(name, self._prompts)}; there are {known}"
            )
        return self._prompts[name]

    def _submitted(
        self,
        requests: Request | Iterable[Request],
        prompts: str | Sequence[str],
        task_name: Task | Sequence[Task | None] | None,
        options: GenerationOptions,
    ) -> list[tuple[Ticket, bool]]:
        inputs = listed(requests)
        names = [prompts] * len(inputs) if isinstance(prompts, str) else list(prompts)
        tasks: list[Task | None]
        if task_name is None or isinstance(task_name, str | int):
            tasks = [task_name] * len(inputs)
        else:
            tasks = list(task_name)
        for what, count in (("prompts", len(names)), ("task_name", len(tasks))):
            if count != len(inputs):
                raise ConfigError(
                    f"{what} expects one name, or one for each of the {len(inputs)} inputs, got {count}"
                )
        asked = []
        for name, task, each in zip(names, tasks, inputs, strict=True):
            own = self._known(name).of_task(task)
            (ids,), (cut,) = sources_of(own.rows, [each])
            asked.append((request_of(own.rows, own.value, ids, options=options), cut))
        return [(self.batcher.submit(request, wait=True), cut) for request, cut in asked]


def _detached(prompt: TunedPrompt | DetachedPrompt) -> DetachedPrompt:
    return prompt if isinstance(prompt, DetachedPrompt) else DetachedPrompt.of(prompt)


def _generation(end: FinishEvent, cut: bool) -> Generation:
    if end.ended_by is None:
        raise ConfigError(
            "the request was cancelled before its end, as serving was closed; ask again"
        )
    return Generation(
        text=end.text,
        input_token_count=end.input_tokens,
        generated_tokens=len(end.tokens),
        finish_reason=end.ended_by,
        seed=end.seed,
        input_cut=cut,
    )
