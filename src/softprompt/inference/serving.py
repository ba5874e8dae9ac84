"""Many prompts of one base, answering together: the Python face of the batcher and the scorer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, final

from torch import Tensor

from softprompt.display import one_line, page, table
from softprompt.errors import AdapterError, ConfigError, nearest
from softprompt.generation import (
    Batcher,
    Bounds,
    Generation,
    GenerationOptions,
    Input,
    Labelling,
    LabelScores,
    Request,
    Scorer,
    Ticket,
    async_pieces,
    in_thread,
    label_ids_of,
    label_set,
    options_from,
    pieces,
)
from softprompt.inference.inputs import Fields, Inputs, Names, Task, Tasks, addressed, check_names, inputs_of
from softprompt.inference.tuned import TunedPrompt


class Scored(NamedTuple):
    """Inputs of one prompt that the scorer has: their numbers in the call, and their rows' log-probabilities."""

    numbers: Sequence[int]
    labelling: Labelling
    sums: Future[Tensor]


@final
class Serving(AbstractContextManager["Serving"]):
    """Prompts of one base model that answer many inputs at once, each equal to its answer alone.

    ``softprompt.load`` makes it from folders. Thread-safe. Closing it, also at the end of a
    ``with`` block, cancels what runs.

    Args:
        prompts: The prompts by the names that calls use, at least one, all on one base.
        bounds: What may be used at most.

    Raises:
        ConfigError: There is no prompt, a name is no text, or they have different bases.
    """

    def __init__(self, prompts: Mapping[str, TunedPrompt], bounds: Bounds | None = None) -> None:
        check_names(prompts)
        self._base = next(iter(prompts.values())).base
        self._prompts: dict[str, TunedPrompt] = {}
        for name, tuned in prompts.items():
            self.put(name, tuned)
        self.batcher = Batcher(self._base, bounds)
        self._scorer = Scorer(self._base, self.batcher.bounds, self.batcher.residents)
        self._scorer.start()

    @property
    def prompts(self) -> tuple[str, ...]:
        """The names of the prompts."""
        return tuple(self._prompts)

    def __repr__(self) -> str:
        """Return the base and the names of the prompts."""
        prompts = f"{len(self._prompts)} prompt{'' if len(self._prompts) == 1 else 's'}"
        return one_line("Serving", f"{prompts} on {self._base.name}: {', '.join(self._prompts)}")

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table of the prompts."""
        head = ("prompt", "task", "labels", "virtual tokens", "metrics")
        rows = []
        for name, each in self._prompts.items():
            scores = ", ".join(f"{score} {value:.4g}" for score, value in each.scores.items())
            rows.append(
                (name, each.whole.task, ", ".join(each.labels or ()), each.config.num_virtual_tokens, scores)
            )
        return page(f"Serving on {self._base.name}", table(rows, head))

    def put(self, name: str, prompt: TunedPrompt) -> None:
        """Serve a prompt as it is now under a name; requests that run keep the one they began with.

        Raises:
            ConfigError: The name is no text, or the prompt is on another base or has a head of its own.
        """
        check_names([name])
        if prompt.base.model is not self._base.model:
            raise ConfigError(f"prompt {name!r} is on another base model; load it onto the same one")
        prompt.check_served()
        self._prompts[name] = prompt.snapshot()

    def submit(
        self,
        request: Fields,
        prompt: str,
        options: GenerationOptions,
        *,
        task_name: Task | None = None,
        **more: Any,
    ) -> Ticket:
        """Submit a request and return at once; ``more`` are fields of a batcher's request (``n``, ``logprobs``).

        Raises:
            SoftPromptError: There is no such prompt or task, the input does not fit it, or the queue is full.
        """
        own = self._known(prompt, task_name)
        (given,) = inputs_of(own.rows, [request])
        return self.batcher.submit(Request.of(given, own.prompt(), options=options, **more))

    def generate(
        self, requests: Inputs, prompts: Names, *, task_name: Tasks = None, **settings: Any
    ) -> list[Generation]:
        """Return one answer for each input.

        Args:
            requests: One input or several: texts, or mappings of the template's fields.
            prompts: The name of the prompt of each input, or one for all.
            task_name: The task of multitask prompts, by name or number; or one for each input, None
                where its prompt has one.
            **settings: How to generate: fields of ``GenerationOptions``, or these as ``options``.

        Raises:
            SoftPromptError: There is no such prompt or task, an input does not fit it, or serving ended.
        """
        chosen = options_from(settings, "generate")
        tickets = self._submitted(requests, prompts, task_name, chosen)
        with _cancelled(ticket for ticket, _ in tickets):
            return [Generation.of(ticket.result()[0], cut=given.cut) for ticket, given in tickets]

    async def agenerate(
        self, requests: Inputs, prompts: Names, *, task_name: Tasks = None, **settings: Any
    ) -> list[Generation]:
        """Answer as ``generate``, without blocking the event loop."""
        chosen = options_from(settings, "agenerate")
        # In a thread, as it waits while the queue is full.
        tickets = await in_thread(
            lambda: self._submitted(requests, prompts, task_name, chosen), lambda each: each[0].cancel()
        )
        with _cancelled(ticket for ticket, _ in tickets):
            ends = await asyncio.gather(*(ticket for ticket, _ in tickets))
        return [Generation.of(end[0], cut=given.cut) for end, (_, given) in zip(ends, tickets, strict=True)]

    def stream(
        self, request: Fields, prompt: str, *, task_name: Task | None = None, **settings: Any
    ) -> Iterator[str]:
        """Yield the answer to one input piece by piece; dropping the iterator cancels it."""
        chosen = options_from(settings, "stream")
        return pieces(self.submit(request, prompt, chosen, task_name=task_name))

    def astream(
        self, request: Fields, prompt: str, *, task_name: Task | None = None, **settings: Any
    ) -> AsyncIterator[str]:
        """Yield as ``stream``, without blocking the event loop."""
        chosen = options_from(settings, "astream")
        return async_pieces(self.submit(request, prompt, chosen, task_name=task_name))

    def classify(
        self,
        requests: Inputs,
        prompts: Names,
        labels: Sequence[str] | None = None,
        *,
        task_name: Tasks = None,
        normalize: bool = False,
    ) -> list[LabelScores]:
        """Return how likely each label is as the answer to each input, given as for ``generate``.

        ``labels`` is the label set; None takes each prompt's own. ``normalize`` divides a label's
        log-probability by its token count.

        Raises:
            SoftPromptError: As ``generate``; or there is no label set, or two labels have the same tokens.
        """
        scored = self._scored(requests, prompts, labels, task_name)
        with _cancelled(each.sums for each in scored):
            return _in_order(scored, [each.sums.result() for each in scored], normalize=normalize)

    async def aclassify(
        self,
        requests: Inputs,
        prompts: Names,
        labels: Sequence[str] | None = None,
        *,
        task_name: Tasks = None,
        normalize: bool = False,
    ) -> list[LabelScores]:
        """Answer as ``classify``, without blocking the event loop."""
        scored = await in_thread(
            lambda: self._scored(requests, prompts, labels, task_name), lambda each: each.sums.cancel()
        )
        with _cancelled(each.sums for each in scored):
            sums = await asyncio.gather(*(asyncio.wrap_future(each.sums) for each in scored))
        return _in_order(scored, sums, normalize=normalize)

    def close(self) -> None:
        """Cancel what runs and stop."""
        self._scorer.stop()
        self.batcher.stop()

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _known(self, name: str, task: Task | None) -> TunedPrompt:
        if name not in self._prompts:
            known = ", ".join(self._prompts)
            raise AdapterError(f"there is no prompt {name!r}{nearest(name, self._prompts)}; there are {known}")
        return self._prompts[name].of_task(task)

    def _submitted(
        self, requests: Inputs, prompts: Names, task_name: Tasks, options: GenerationOptions
    ) -> list[tuple[Ticket, Input]]:
        queued = []
        for each in addressed(requests, prompts, task_name):
            own = self._known(each.prompt, each.task)
            (given,) = inputs_of(own.rows, [each.request])
            queued.append((Request.of(given, own.prompt(), options=options), given))
        tickets: list[tuple[Ticket, Input]] = []
        try:
            for request, given in queued:
                tickets.append((self.batcher.submit(request, wait=True), given))
        except BaseException:
            # Nobody would read the answers to those before the one that was refused.
            for ticket, _ in tickets:
                ticket.cancel()
            raise
        return tickets

    def _scored(
        self, requests: Inputs, prompts: Names, labels: Sequence[str] | None, task_name: Tasks
    ) -> list[Scored]:
        """Give the scorer the inputs of each prompt together."""
        grouped: dict[tuple[str, Task | None], dict[int, Fields]] = {}
        for number, each in enumerate(addressed(requests, prompts, task_name)):
            grouped.setdefault((each.prompt, each.task), {})[number] = each.request
        queued = []
        for (name, task), of_prompt in grouped.items():
            own = self._known(name, task)
            chosen = label_set(labels, own.manifest.labels)
            if chosen is None:
                raise ConfigError(f"prompt {name!r} generates free text and has no label set; pass labels=[...]")
            inputs = inputs_of(own.rows, of_prompt.values())
            labelling = Labelling(chosen, label_ids_of(own.rows, chosen), inputs)
            queued.append((list(of_prompt), labelling, labelling.rows(own.prompt())))
        scored: list[Scored] = []
        try:
            for numbers, labelling, rows in queued:
                scored.append(Scored(numbers, labelling, self._scorer.submit(rows)))
        except BaseException:
            for begun in scored:
                begun.sums.cancel()
            raise
        return scored


@contextmanager
def _cancelled(begun: Iterable[Ticket | Future[Tensor]]) -> Iterator[None]:
    """Cancel, at the end of the context, what has not ended."""
    try:
        yield
    finally:
        for each in begun:
            each.cancel()


def _in_order(scored: Sequence[Scored], sums: Sequence[Tensor], *, normalize: bool) -> list[LabelScores]:
    """Return the answers of several prompts in the order of a call's inputs."""
    found: dict[int, LabelScores] = {}
    for each, own in zip(scored, sums, strict=True):
        found |= zip(each.numbers, each.labelling.answers(own, normalize=normalize), strict=True)
    return [found[number] for number in range(len(found))]
