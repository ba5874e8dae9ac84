"""Successive halving (Jamieson & Talwalkar 2016): candidates side by side, the better ones trained further."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch

from softprompt.errors import ProcessLostError, TrainingError, TrainingInterrupted
from softprompt.progress import progress_bar
from softprompt.training import (
    Candidate,
    Member,
    Prepared,
    Saving,
    Snapshot,
    StopSignal,
    Trained,
    TuneSettings,
    ended_by,
    how_to_go_on,
    identity,
    quality_of,
    save_states,
    stages_of,
    train_together,
    varied,
)
from softprompt.training.sweeps.space import Combination

logger = logging.getLogger(__name__)


@final
@dataclass(slots=True)
class Tried:
    """One candidate of a sweep.

    Attributes:
        name: Its number, from 1.
        choice: What was chosen for it.
        learning_rate: Its peak learning rate.
        points: ``steps``, training ``loss`` and ``validation`` metrics at the end of each rung it reached.
        problem: Why it ended early, where its loss was not finite.
    """

    name: str
    choice: Combination
    learning_rate: float | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None

    @property
    def standing(self) -> tuple[int, list[float]]:
        """What candidates are ranked by: the rungs reached, then the quality at the last one; more is better."""
        return len(self.points), quality_of(self.points[-1]["validation"]) if self.points else []

    def take(self, other: Tried) -> None:
        """Take over what was found of the same candidate elsewhere."""
        self.learning_rate, self.points, self.problem = other.learning_rate, other.points, other.problem

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tried:
        """Return what ``to_dict`` gave."""
        return cls(**(dict(values) | {"choice": Combination(**values["choice"])}))


@final
class Halving:
    """The candidates of a sweep and the prompts of those that are still trained.

    What was found at the end of a rung is kept with the states, so the same calls on an interrupted sweep pass over
    what is done.
    """

    def __init__(
        self,
        first: Prepared,
        run: TuneSettings,
        output: Path | None,
        stop: StopSignal,
        found: Mapping[str, Snapshot],
        record: Mapping[str, Any],
        callbacks: Sequence[object] = (),
        elsewhere: Callable[..., Iterator[Any]] | None = None,
        again: str = "",
    ) -> None:
        """Begin, or go on from the snapshots and the record of an interrupted sweep.

        Args:
            first: A run on the base and the records of all.
            run: The settings that all share.
            output: Where the states are kept; None in all but the first process.
            stop: Checked before each batch.
            found: The snapshots of an interrupted sweep, by candidate.
            record: What it kept beside them.
            callbacks: What is called as it goes, for each of the candidates.
            elsewhere: Trains candidates to the end of a rung and yields what ``kept`` returns of them; None trains
                them here.
            again: What the command that goes on has besides.
        """
        self.tried: dict[str, Tried] = {
            name: Tried.from_dict(each) for name, each in record.get("candidates", {}).items()
        }
        self._added, self._callbacks, self._elsewhere, self._again = 0, callbacks, elsewhere, again
        self._first, self._run, self._output, self._stop = first, run, output, stop
        self._found, self._members = dict(found), dict[str, Member]()

    @property
    def total_steps(self) -> int:
        """Updates of a candidate that is trained to its end."""
        (stage,) = stages_of(self._first, {}, self._stop.check)
        return stage.total_updates()

    def add(self, choice: Combination) -> Tried:
        """Take in a candidate, which an interrupted sweep may have had."""
        self._added += 1
        name = str(self._added)
        return self.tried.setdefault(name, Tried(name, choice))

    def train(self, group: Sequence[Tried], rung: int, until: int | None, title: str) -> None:
        """Train candidates to the end of a rung and measure them.

        Args:
            group: The candidates.
            rung: Its number from 0.
            until: Its steps; None for all.
            title: What a log line calls it.

        Raises:
            TrainingInterrupted: with the command that continues.
        """
        going = [each for each in group if each.problem is None and len(each.points) <= rung]
        if not going:
            return
        logger.info("%s: %d prompts to step %d", title, len(going), until or self.total_steps)
        try:
            if self._elsewhere is None:
                self._train(going, until)
            else:
                with progress_bar(len(going), "candidate") as bar:
                    for snapshots, record in self._elsewhere(going, self._found, rung, until):
                        self._found |= snapshots
                        for name, values in record["candidates"].items():
                            self.tried[name].take(Tried.from_dict(values))
                        self._save()
                        bar.update(len(record["candidates"]))
        except (TrainingInterrupted, ProcessLostError) as error:
            self._save()
            raise ended_by(error, how_to_go_on(f"in {title}", self._output) + self._again) from None
        self._save()

    def _train(self, going: Sequence[Tried], until: int | None) -> None:
        with unsaid():
            members = [self._member(each) for each in going]
        saving = Saving(self._save, self._run.save_every)
        saving.now()
        with ExitStack() as stack, unsaid():
            candidates: list[Candidate] = []
            for member in members:
                silent = bool(candidates) or member.stage.settings.silence_progress_bars
                candidates.append(member.candidate(self._output, silent=silent))
                stack.enter_context(candidates[-1].events)
            train_together(candidates, check_stop=self._stop.check, saving=saving, until=until)
            for tried, candidate in zip(going, candidates, strict=True):
                ended = until is None or candidate.state.update < until  # as by its patience
                self._measure(tried, candidate, ended=ended)

    def keep(self, group: Sequence[Tried], count: int) -> list[Tried]:
        """Return the best of candidates, at most ``count``, and let go of the prompts of the others.

        Raises:
            TrainingError: the loss of all of them is not finite.
        """
        ranked = sorted((each for each in group if not each.problem), key=lambda each: each.standing, reverse=True)
        if not ranked:
            raise TrainingError(f"no candidate is left: {group[0].problem}; sweep lower learning rates")
        for each in group:
            if each not in ranked[:count]:
                self._members.pop(each.name, None)
                self._found.pop(each.name, None)
        return ranked[:count]

    def finished(self, tried: Tried) -> tuple[Prepared, Trained]:
        """Return a candidate that was trained to its end, its best prompt in its module."""
        with unsaid():
            member = self._member(tried)
            member.end()
        return member.prepared, member.whole()

    def _member(self, tried: Tried) -> Member:
        if tried.name not in self._members:
            prepared = prepared_for(self._first, self._run, tried.choice)
            found = self._found.pop(tried.name, None)
            member = Member(tried.name, prepared, self._callbacks, found, what="candidate")
            (stage,) = stages_of(prepared, {}, self._stop.check)
            member.begin(stage)
            tried.learning_rate = stage.learning_rate
            self._members[tried.name] = member
        return self._members[tried.name]

    def _measure(self, tried: Tried, candidate: Candidate, *, ended: bool) -> None:
        """Note where a candidate is at the end of a rung; at its own end its best epoch counts."""
        stage, state = candidate.stage, candidate.state
        if candidate.problem is not None:
            tried.problem = str(candidate.problem)
            return
        assert stage.validation is not None
        metrics = state.history[-1]["validation"] if state.history and not state.group else None
        if ended and stage.settings.keep_best:
            metrics = state.history[state.best_epoch - 1]["validation"]
        if metrics is None:
            with torch.no_grad():
                metrics = stage.validation.metrics([stage.prompt.prompt()])
        loss = state.mean_loss if state.group else state.history[-1]["loss"]
        tried.points.append({"steps": state.update, "loss": loss, "validation": metrics})

    def kept(self) -> tuple[dict[str, Snapshot], dict[str, Any]]:
        """Return where the candidates are, and what is known of them: what another one goes on from."""
        snapshots = self._found | {name: each.snapshot() for name, each in self._members.items()}
        return snapshots, {"candidates": {name: each.to_dict() for name, each in self.tried.items()}}

    def _save(self) -> None:
        if self._output is not None:
            snapshots, record = self.kept()
            save_states(self._output, snapshots, identity(self._first), record)


def prepared_for(first: Prepared, run: TuneSettings, choice: Combination) -> Prepared:
    """Return a candidate's run on the base and the records of the first one."""
    prepared = varied(first, choice.settings(run))
    if choice.factor is None:
        return prepared
    rate = prepared.rates.prompt * choice.factor
    settings = replace(prepared.settings, learning_rate=rate)
    return replace(prepared, settings=settings, rates=replace(prepared.rates, prompt=rate))


def steps_of_rungs(total: int, candidates: int, eta: int, rungs: int | None) -> list[int]:
    """Return the steps of each rung, the last one all; by default as many rungs as leave one candidate."""
    # 1e-9 against the rounding of the logarithm, as of 9 to the base 3.
    count = rungs or 1 + math.floor(math.log(candidates, eta) + 1e-9)
    return sorted({max(1, round(total / eta**left)) for left in range(count)})


@contextmanager
def unsaid() -> Iterator[None]:
    """Say nothing of single candidates inside: their lines would bury those of the sweep."""
    silenced = [logging.getLogger(f"softprompt.training.{each}") for each in _OF_ONE]
    before = [each.disabled for each in silenced]
    for each in silenced:
        each.disabled = True
    try:
        yield
    finally:
        for each, was in zip(silenced, before, strict=True):
            each.disabled = was


_OF_ONE = ("loop", "events", "validation", "optimisation", "preparation", "collapse", "starts")
"""Modules that speak of one prompt."""
