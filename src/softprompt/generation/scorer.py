"""The label scorer: log-probabilities of targets for one caller, or in a thread for many."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from softprompt.backbone import Base
from softprompt.engine import Engine, EngineRow, FrontPrompts, ResidentPrompts, build_engine
from softprompt.errors import ConfigError, NotServingError, QueueFullError
from softprompt.generation.options import Bounds
from softprompt.prompts import Prompt

logger = logging.getLogger(__name__)

_LONG, _MOST_KEPT = 64, 8192
"""Virtual tokens from which on a prompt is kept between the passes of a call, and most that all prompts have."""
_RETRY_SECONDS = 1.0
_BREATH = 0.001
"""Seconds between two turns, in which who waits for the base gets its lock: locks are not fair by themselves."""


@torch.no_grad()
def score_rows(
    engine: Engine,
    rows: Sequence[EngineRow],
    *,
    max_rows: int,
    max_tokens: int | None = None,
    residents: FrontPrompts | None = None,
) -> Tensor:
    """Return the log-probability of each row's target, float32 ``[N]`` in nats on the CPU, without gradients.

    Rows may come in any order. Those of one source stay together, because the forest engine then runs it
    once; those of one prompt and of like lengths share passes, so that a prompt is run seldom and a padded
    engine pads little. A pass has at most ``max_rows`` rows and, if more than one, ``max_tokens`` tokens
    (None is no limit). ``residents`` keep prompts in front as keys and values; None keeps long ones for the call.

    Raises:
        SoftPromptError: The rows do not fit the model.
        ConfigError: ``max_rows`` is less than 1.
    """
    if max_rows < 1:
        raise ConfigError(f"batch_size expects at least 1 row, got {max_rows}")
    if residents is None and len(rows) > max_rows:
        residents = _for_one_call(engine, rows)
    own = rows if residents is None else residents.in_front(rows, engine)
    residents = None  # it holds a copy of what the rows have now
    sums = torch.zeros(len(rows))
    for numbers in _passes(own, max_rows, max_tokens):
        part = [own[i] for i in numbers]
        sums[numbers] = engine.target_log_probs(part).row_sums(len(part)).float().cpu()
    return sums


def _for_one_call(engine: Engine, rows: Sequence[EngineRow]) -> FrontPrompts | None:
    """Return what keeps prompts between the passes of a call, such as a text before all; None if not worth it."""
    lengths = {row.prompt: row.prompt.tokens for row in rows if row.prompt is not None}
    if max(lengths.values(), default=0) < _LONG or sum(lengths.values()) > _MOST_KEPT:
        return None
    return FrontPrompts(engine.base, ResidentPrompts(len(lengths), sum(lengths.values())))


def _passes(rows: Sequence[EngineRow], max_rows: int, max_tokens: int | None) -> list[list[int]]:
    """Cut the numbers of rows into passes within the bounds."""
    passes: list[list[int]] = []
    tokens, known = 0, set[Prompt | None]()
    for i in _ordered(rows):
        last = rows[passes[-1][-1]] if passes else None
        need = _tokens_beside(rows[i], last, known)
        beyond = max_tokens is not None and tokens + need > max_tokens
        if last is None or len(passes[-1]) == max_rows or beyond:
            tokens, known = 0, set()
            need = _tokens_beside(rows[i], None, known)
            passes.append([])
        passes[-1].append(i)
        tokens += need
        known.add(rows[i].prompt)
    return passes


def _ordered(rows: Sequence[EngineRow]) -> list[int]:
    """Return the numbers of rows by prompt, length of the source, and source."""
    prompts: dict[Prompt | None, int] = {}
    sources: dict[tuple[int, int, tuple[int, ...]], int] = {}
    keys = []
    for row in rows:
        prompt = prompts.setdefault(row.prompt, len(prompts))
        source = sources.setdefault((prompt, row.at, row.source), len(sources))
        keys.append((prompt, len(row.source), source))
    return sorted(range(len(rows)), key=keys.__getitem__)


def _tokens_beside(row: EngineRow, last: EngineRow | None, known: Set[Prompt | None]) -> int:
    """Return the tokens that a row adds to a pass that ends with ``last`` and has the ``known`` prompts."""
    prompt = None if row.prompt in known else row.prompt
    # A prefix is read, not run.
    virtual = 0 if prompt is None else prompt.input_tokens + prompt.decoder_tokens
    shared = last is not None and last.source == row.source and last.prompt is row.prompt
    return virtual + len(row.target) + (0 if shared else len(row.source))


@final
@dataclass(slots=True, eq=False)
class Scoring:
    """One caller: its rows, those still to be scored in parts of about a pass, and the sums, float32 on the CPU."""

    rows: tuple[EngineRow, ...]
    left: deque[list[int]]
    sums: Tensor
    answer: Future[Tensor] = field(default_factory=Future)

    @property
    def part(self) -> list[EngineRow]:
        """The rows of its next turn."""
        return [self.rows[i] for i in self.left[0]]

    def take(self, scores: Tensor) -> bool:
        """Take the sums of the turn, and return whether more are to be scored."""
        self.sums[self.left.popleft()] = scores
        if not self.left and self.answer.set_running_or_notify_cancel():
            self.answer.set_result(self.sums)
        return bool(self.left)

    def fail(self, error: Exception) -> None:
        """End with an error, unless the caller has gone."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


@final
class Scorer:
    """Dynamic batching of label scores: a thread that scores what waits in shared passes.

    Callers take turns of about a pass, so that one with many rows holds up no other for longer, and one that has
    gone is dropped at its next turn.

    Args:
        base: The base, whose lock is held for each pass.
        bounds: Of a pass, its targets (``max_score_rows``) and, if they are of more than one row, its tokens
            (``max_step_tokens``); of the callers, how many wait (``max_queue``).
        residents: Where keys and values of prompts are kept; with no room there, every pass computes them.
    """

    def __init__(self, base: Base, bounds: Bounds, residents: ResidentPrompts) -> None:
        self._base = base
        self._bounds = bounds
        self._waiting: deque[Scoring] = deque()
        self._front = FrontPrompts(base, residents)
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="softprompt-scorer", daemon=True)

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and takes rows."""
        return self._thread.is_alive() and not self._stopped

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        # A thread that is in a pass when the interpreter ends would take it down.
        atexit.register(self.stop)

    def submit(self, rows: Sequence[EngineRow]) -> Future[Tensor]:
        """Queue targets to be scored; cancelling what is returned ends the work on them.

        Raises:
            QueueFullError: Too many callers wait.
            NotServingError: It has stopped.
        """
        # A turn is cut into passes once more, with what is known of its prompts then.
        parts = _passes(rows, self._bounds.max_score_rows, 2 * self._bounds.max_step_tokens)
        scoring = Scoring(tuple(rows), deque(parts or [[]]), torch.zeros(len(rows)))
        with self._changed:
            if self._stopped:
                raise NotServingError("serving is stopping and takes no more requests; ask another server")
            if len(self._waiting) >= self._bounds.max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later", _RETRY_SECONDS)
            self._waiting.append(scoring)
            self._changed.notify()
        return scoring.answer

    def stop(self) -> None:
        """Finish the turn that runs, and fail what waits."""
        self._fail_waiting("serving has stopped; ask again")
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)

    def _fail_waiting(self, why: str) -> None:
        with self._changed:
            self._stopped = True
            left, self._waiting = self._waiting, deque()
            self._changed.notify()
        for each in left:
            each.fail(NotServingError(why))

    def _work(self) -> None:
        try:
            while batch := self._turn():
                if more := self._scored(batch):
                    self._wait_again(more)
                    time.sleep(_BREATH)
        except Exception:
            logger.exception("scoring has failed")
            self._fail_waiting("scoring has failed; start it again")

    def _turn(self) -> list[Scoring]:
        """Wait for callers, and take the first and those that fit beside it; none at the end."""
        batch, rows = list[Scoring](), 0
        with self._changed:
            while not batch and not self._stopped:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                for each in list(self._waiting):
                    gone = each.answer.cancelled()
                    fits = not batch or rows + len(each.left[0]) <= self._bounds.max_score_rows
                    if gone:
                        each.answer.set_running_or_notify_cancel()
                    elif fits:
                        batch.append(each)
                        rows += len(each.left[0])
                    if gone or fits:
                        self._waiting.remove(each)
        return batch

    def _wait_again(self, more: Sequence[Scoring]) -> None:
        """Put callers behind those that have waited meanwhile."""
        with self._changed:
            stopped = self._stopped
            self._waiting.extend(() if stopped else more)
        for each in more if stopped else ():
            each.fail(NotServingError("serving has stopped; ask again"))

    def _scored(self, batch: Sequence[Scoring]) -> list[Scoring]:
        """Score a turn of each caller, and return those that have more."""
        parts = [each.part for each in batch]
        try:
            sums = score_rows(
                self._engine,
                [row for part in parts for row in part],
                max_rows=self._bounds.max_score_rows,
                max_tokens=self._bounds.max_step_tokens,
                residents=self._front,
            )
        except Exception as error:  # whatever a model's own code raises on one of the rows
            if len(batch) > 1:
                return [more for each in batch for more in self._scored([each])]
            batch[0].fail(error)
            return []
        scores = torch.split(sums, [len(part) for part in parts])
        return [each for each, own in zip(batch, scores, strict=True) if each.take(own)]

    @cached_property
    def _engine(self) -> Engine:
        return build_engine(self._base)
