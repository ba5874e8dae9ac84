"""The label scorer: log-probabilities of targets for one caller, or in a thread for many."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Sequence, Set
from concurrent.futures import Future
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from softprompt.backbone import Base
from softprompt.engine import Engine, EngineRow, FrontPrompts, ResidentPrompts, build_engine
from softprompt.errors import ConfigError, NotServingError, QueueFullError
from softprompt.generation.options import Bounds
from softprompt.prompts import Prompt

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0


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
    (None is no limit). ``residents`` keep prompts in front as keys and values; None runs them in every pass.

    Raises:
        SoftPromptError: The rows do not fit the model.
        ConfigError: ``max_rows`` is less than 1.
    """
    if max_rows < 1:
        raise ConfigError(f"batch_size expects at least 1 row, got {max_rows}")
    own = rows if residents is None else residents.in_front(rows, engine)
    sums = torch.zeros(len(rows))
    for numbers in _passes(own, max_rows, max_tokens):
        part = [own[i] for i in numbers]
        sums[numbers] = engine.target_log_probs(part).row_sums(len(part)).float().cpu()
    return sums


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


class Scoring(NamedTuple):
    """The rows of one caller, and what gets the log-probability of each row's target, float32 on the CPU."""

    rows: tuple[EngineRow, ...]
    answer: Future[Tensor]


@final
class Scorer:
    """Dynamic batching of label scores: a thread that scores what waits in shared passes.

    Args:
        base: The base, whose lock is held for each pass.
        bounds: Of a pass, its targets (``max_score_rows``) and, if they are of more than one row, its tokens
            (``max_step_tokens``); of the callers, how many wait (``max_queue``).
        residents: Where keys and values of prompts are kept; with no room there, every pass computes them.
    """

    def __init__(self, base: Base, bounds: Bounds, residents: ResidentPrompts) -> None:
        self._base = base
        self._bounds = bounds
        self._waiting: queue.Queue[Scoring | None] = queue.Queue(bounds.max_queue)
        self._front = FrontPrompts(base, residents)
        self._stopped = False
        self._guard = threading.Lock()
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
        """Queue targets to be scored.

        Raises:
            QueueFullError: Too many callers wait.
            NotServingError: It has stopped.
        """
        scoring = Scoring(tuple(rows), Future())
        try:
            with self._guard:
                if self._stopped:
                    raise NotServingError("serving is stopping and takes no more requests; ask another server")
                self._waiting.put_nowait(scoring)
        except queue.Full:
            raise QueueFullError(
                f"{self._waiting.maxsize} requests wait already; try again later", _RETRY_SECONDS
            ) from None
        return scoring.answer

    def stop(self) -> None:
        """Finish what runs, and fail what waits."""
        self._fail_waiting("serving has stopped; ask again")
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)

    def _fail_waiting(self, why: str) -> None:
        with self._guard:  # what is put behind the end would never be answered
            self._stopped = True
        while True:
            try:
                left = self._waiting.get_nowait()
            except queue.Empty:
                return
            if left is not None and left.answer.set_running_or_notify_cancel():
                left.answer.set_exception(NotServingError(why))

    def _work(self) -> None:
        try:
            self._score_all()
        except Exception:
            logger.exception("scoring has failed")
            self._fail_waiting("scoring has failed; start it again")

    def _score_all(self) -> None:
        held: Scoring | None = None
        while True:
            first = held or self._waiting.get()
            if first is None:
                return
            held, batch, ends = self._batch(first)
            alive = [each for each in batch if each.answer.set_running_or_notify_cancel()]
            if alive:
                self._answer(alive)
            if ends:
                return

    def _batch(self, first: Scoring) -> tuple[Scoring | None, list[Scoring], bool]:
        """Take what waits and may share a pass; what may not is first next time."""
        batch, rows = [first], len(first.rows)
        while True:
            try:
                following = self._waiting.get_nowait()
            except queue.Empty:
                return None, batch, False
            if following is None:
                return None, batch, True
            rows += len(following.rows)
            if rows > self._bounds.max_score_rows:
                return following, batch, False
            batch.append(following)

    def _answer(self, batch: Sequence[Scoring]) -> None:
        rows = [row for each in batch for row in each.rows]
        try:
            sums = score_rows(
                self._engine,
                rows,
                max_rows=self._bounds.max_score_rows,
                max_tokens=self._bounds.max_step_tokens,
                residents=self._front,
            )
        except Exception as error:  # whatever a model's own code raises on one of the rows
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for each in batch:
                self._answer([each])
            return
        parts = torch.split(sums, [len(each.rows) for each in batch])
        for each, scores in zip(batch, parts, strict=True):
            each.answer.set_result(scores)

    @cached_property
    def _engine(self) -> Engine:
        return build_engine(self._base)
