"""Many requests on one model by the same runners: Batcher, a queue and its thread; Decoder, a list in the caller's.

The thread takes the model's lock for each pass, so other calls on the model take turns with it. A request fails
alone. If the thread itself fails, all its requests fail with the reason, and ``healthy`` is False.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, final

from softprompt.backbone import Base
from softprompt.engine import ResidentPrompts, why_undecodable
from softprompt.errors import ConfigError, NotServingError, QueueFullError
from softprompt.generation.answer import AnswerRules, Job
from softprompt.generation.fallback_runner import FallbackRunner, PaddedGenerate, beam_search
from softprompt.generation.forest_runner import ForestRunner
from softprompt.generation.options import Bounds
from softprompt.generation.request import Request, check_request
from softprompt.generation.ticket import FinishEvent, Ticket, pieces

logger = logging.getLogger(__name__)

_LEAST, _MOST = 1.0, 60.0
_WEIGHT = 0.1
"""Weight of the newest interval in the mean."""


@final
class Pace:
    """Mean seconds between answers that end, recent ones counting most."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = 0.1

    def note(self, ended: int) -> None:
        """Note that some answers ended now."""
        now = time.monotonic()
        if ended:
            self._seconds += _WEIGHT * ((now - self._last) / ended - self._seconds)
            self._last = now

    def seconds_for(self, waiting: int) -> float:
        """Return after how many seconds half of those who wait are likely to run."""
        return min(_MOST, max(_LEAST, self._seconds * waiting / 2))


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Counters of a batcher.

    Attributes:
        waiting: Requests in the queue.
        running: Answers that run.
        cached_tokens: Tokens that there is memory for, whether or not rows use it now.
        resident_prompts: Prompts whose keys and values are kept.
        resident_tokens: Virtual tokens of those.
        prompt_hits: Requests so far that found their prompt's keys and values.
        prompt_misses: Requests so far that had to compute them.
        steps: Passes run so far.
        upstream_errors: Failures of servers that compute for this one, by address and kind.
    """

    waiting: int = 0
    running: int = 0
    cached_tokens: int = 0
    resident_prompts: int = 0
    resident_tokens: int = 0
    prompt_hits: int = 0
    prompt_misses: int = 0
    steps: int = 0
    upstream_errors: Mapping[tuple[str, str], int] = field(default_factory=dict)


@final
class Batcher:
    """Continuous batching of requests for any prompts of one base, in a thread.

    The base is put into evaluation mode.

    Attributes:
        bounds: What it uses at most.
        reason: Why it is not the decode forest that runs the requests; empty when it is.
    """

    def __init__(self, base: Base, bounds: Bounds | None = None) -> None:
        base.model.eval()  # type: ignore[no-untyped-call]
        self.bounds = (bounds or Bounds()).settled(base.device.type)
        self.reason = why_undecodable(base)
        self._rules = AnswerRules.of(base)
        self._runner = runner_of(base, self.bounds, self._rules)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._pace = Pace()
        self._stats = BatcherStats()
        self._closing = False
        self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="softprompt-batcher", daemon=True)
        self._thread.start()
        # A thread that is in a pass when the interpreter ends would take it down.
        atexit.register(self.stop)

    @property
    def engine(self) -> str:
        """What runs the requests: "forest" or "simple"."""
        return self._runner.name

    @property
    def residents(self) -> ResidentPrompts:
        """The prompts whose keys and values are kept; a scorer of the same model may share them."""
        return self._runner.residents

    @property
    def healthy(self) -> bool:
        """Whether the thread runs."""
        return self._failure is None and self._thread.is_alive()

    @property
    def failure(self) -> Exception | None:
        """What the thread failed with."""
        return self._failure

    @property
    def stats(self) -> BatcherStats:
        """The counters now."""
        kept = self.residents
        with self._changed:
            return replace(
                self._stats,
                waiting=len(self._waiting),
                resident_prompts=len(kept),
                resident_tokens=kept.tokens,
                prompt_hits=kept.hits,
                prompt_misses=kept.misses,
            )

    def submit(self, request: Request, *, wait: bool = False) -> Ticket:
        """Take a request into the queue; any thread may call. ``wait`` waits while the queue is full.

        Raises:
            SoftPromptError: The request could never be run.
            QueueFullError: Too many wait.
            NotServingError: The batcher is stopping, has stopped, or has failed.
        """
        if request.options.num_beams > 1:
            raise ConfigError(
                f"num_beams {request.options.num_beams} is not served, as beams cannot be streamed; leave it at 1"
            )
        self._runner.check(request)
        ticket = Ticket(request, self._wake)
        job = Job.of(ticket, self._rules)
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closing or not self._is_full)
            if self._failure is not None:
                raise _failed(self._failure)
            if self._closing:
                raise NotServingError("serving is stopping and takes no more requests; ask another server")
            if self._is_full:
                seconds = self._pace.seconds_for(len(self._waiting))
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait, which is max_queue; try again in {seconds:.0f} s", seconds
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return ticket

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that are here; False if that took too long."""
        with self._changed:
            self._closing = True
            return self._changed.wait_for(self._is_idle, timeout)

    def stop(self) -> None:
        """Stop the thread; requests that are here end with the reason "cancelled"."""
        with self._changed:
            self._closing = self._stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.stop)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def _is_full(self) -> bool:
        return len(self._waiting) >= self.bounds.max_queue

    def _is_idle(self) -> bool:
        return self._failure is not None or not (self._waiting or self._runner.rows)

    def _work(self) -> None:
        try:
            while self._has_work():
                self._admit()
                self._runner.step()
                self._note()
            self._abandon(None)
        except Exception as cause:
            logger.exception("serving has failed")
            self._abandon(cause)

    def _has_work(self) -> bool:
        """Wait for something to do; False when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._runner.rows):
                self._changed.wait()
            return not self._stopping

    def _admit(self) -> None:
        """Start waiting jobs in order, until one finds no room."""
        with self._changed:
            waiting = list(self._waiting)
        gone: list[Job] = []
        room = True
        for job in waiting:
            if job.is_over:
                job.close()
                gone.append(job)
            elif room:
                admission = self._runner.admit(job)
                room = admission != "no room"
                gone += [job] if admission == "started" else []
        with self._changed:
            for job in gone:
                self._waiting.remove(job)

    def _note(self) -> None:
        """Update the counters, and wake callers that wait for room."""
        runner = self._runner
        with self._changed:
            before = self._stats
            self._stats = BatcherStats(
                running=runner.rows, cached_tokens=runner.cached_tokens, steps=before.steps + 1
            )
            self._pace.note(max(0, before.running - runner.rows))
            self._changed.notify_all()

    def _abandon(self, cause: Exception | None) -> None:
        """End every job: cancelled, or failed with the cause."""
        with self._changed:
            self._failure, self._closing = cause, True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        if cause is None:
            for job in [*waiting, *self._runner.jobs]:
                job.ticket.cancel()
                job.close()
            return
        error = _failed(cause)
        for job in [*waiting, *self._runner.jobs]:
            job.fail(error)


def _failed(cause: Exception) -> NotServingError:
    """Return the error that callers get; the cause may hold what is not theirs to read."""
    error = NotServingError(f"serving has failed ({type(cause).__name__}); start it again")
    error.__cause__ = cause
    return error


def streamed(base: Base, request: Request) -> Iterator[str]:
    """Yield the text of a request's first answer; its batcher runs from the first piece to the last."""
    batcher = Batcher(base)
    try:
        yield from pieces(batcher.submit(request))
    finally:
        batcher.stop()


_UNBOUNDED = 2**62
"""Tokens of a KV cache whose buffers grow as they are needed."""


Runner = ForestRunner | FallbackRunner
"""Runs jobs; all but ``check`` is called by one thread."""


def runner_of(base: Base, bounds: Bounds, rules: AnswerRules) -> Runner:
    """Return the fastest runner that gives each request its solo answer on this base."""
    if why_undecodable(base):
        return FallbackRunner(base, bounds, rules)
    return ForestRunner(base, bounds)


@final
class Decoder:
    """Answers lists of requests; keeps its runner, and the prompts' keys and values, from call to call.

    Any thread may call; calls take turns. The base is put into evaluation mode.
    """

    def __init__(self, base: Base, bounds: Bounds | None = None) -> None:
        base.model.eval()  # type: ignore[no-untyped-call]
        self._base = base
        self._bounds = (bounds or Bounds()).settled(base.device.type, offline=True)
        self._rules = AnswerRules.of(base, offline=True)
        self._guard = threading.Lock()
        self._runner: Runner | None = None

    @classmethod
    def of_batches(cls, base: Base, batch_size: int) -> Self:
        """Return one for lists whose inputs are of any length, which are bounded by the batch size alone.

        Raises:
            ConfigError: The batch size is less than 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size expects at least 1 row, got {batch_size}")
        bounds = Bounds(
            max_batch_rows=batch_size,
            max_step_tokens=max(Bounds().max_step_tokens, batch_size),
            max_cached_tokens=_UNBOUNDED,
            ordered_weights=False,
        )
        return cls(base, bounds)

    def run(self, requests: Sequence[Request]) -> list[tuple[FinishEvent, ...]]:
        """Return the answers to each request, in order; ``max_time`` counts from when a request starts.

        Raises:
            SoftPromptError: A request could never be run, or the model failed on it.
        """
        tickets = [Ticket(request, lambda: None) for request in requests]  # nobody cancels one of a list
        # Rows of like length share a batch, which keeps the padding small.
        order = sorted(tickets, key=lambda ticket: len(ticket.request.ids))
        beams = [ticket for ticket in order if ticket.request.options.num_beams > 1]
        others = [ticket for ticket in order if ticket.request.options.num_beams == 1]
        with self._guard:
            if beams:
                self._search(beams)
            if others:
                self._run(others)
        return [ticket.result() for ticket in tickets]

    def _run(self, tickets: Sequence[Ticket]) -> None:
        # A runner that raised may hold rows, and is not used again.
        runner = self._runner or runner_of(self._base, self._bounds, self._rules)
        self._runner = None
        for ticket in tickets:
            runner.check(ticket.request)
        waiting, held = deque(tickets), list[Job]()
        while waiting or held or runner.rows:
            rows = runner.rows + sum(job.request.n for job in held)
            while waiting and rows + waiting[0].request.n <= self._bounds.max_batch_rows:
                held.append(Job.of(waiting.popleft(), self._rules))
                rows += held[-1].request.n
            held = [job for job in held if runner.admit(job) != "started"]
            runner.step()
        self._runner = runner

    def _search(self, tickets: Sequence[Ticket]) -> None:
        """Run beam search, batch after batch."""
        generate = PaddedGenerate(self._base, self._bounds, self._rules.eos_ids)
        batch: list[Ticket] = []
        for ticket in tickets:
            check_request(self._base, ticket.request)
            if ticket.request.n > 1 or ticket.request.echo:
                raise ConfigError("beam search gives one answer, and no log-probabilities")
            grown = [each.request for each in (*batch, ticket)]
            alike = len({each.options for each in grown}) == 1
            if batch and not (alike and generate.fits(grown)):
                beam_search(generate, [Job.of(each, self._rules) for each in batch])
                batch = []
            batch.append(ticket)
        beam_search(generate, [Job.of(each, self._rules) for each in batch])
