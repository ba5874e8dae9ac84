"""A run from several seeds: side by side, or one after another for as long as nothing is learnt."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, final

from softprompt.training.preparation import Prepared, varied
from softprompt.training.session import Session, Trained
from softprompt.training.summary import nothing_learnt
from softprompt.training.validation import quality_of

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class Seeded:
    """A trained prompt, what it was trained on, and the sentence that says that it learnt nothing, if so."""

    prepared: Prepared
    trained: Trained
    nothing_learnt: str | None

    @property
    def quality(self) -> list[float]:
        """What decides which is best: the validation metrics, or else the training loss."""
        return quality_of(self.trained.metrics.get("validation", self.trained.metrics))


def train_seeds(prepared: Prepared, session: Session) -> tuple[str, dict[str, Seeded]]:
    """Train the prompts that ``seeds`` and ``restarts`` want.

    The records are divided and read once, with the first seed, so the prompts of all are measured on the same ones.

    Returns:
        The seed of the best prompt, whose metrics tell of all, and every prompt by seed; the seed of one that was
        to be alone is empty.
    """
    settings = prepared.settings
    first = replace(prepared, settings=replace(settings, seeds=1, restarts=0))
    if settings.seeds == 1 and not settings.restarts:
        return "", _trained({"": first}, session)
    numbers = [settings.seed + number for number in range(max(settings.seeds, settings.restarts + 1))]
    runs = {str(seed): _from_seed(first, seed) for seed in numbers[: settings.seeds]}
    found = _trained(runs, session)
    for again, seed in enumerate(numbers[settings.seeds :], start=1):
        problem = list(found.values())[-1].nothing_learnt
        if problem is None:
            break
        logger.warning("%s; starting again with seed %d, restart %d of %d", problem, seed, again, settings.restarts)
        found |= _trained({str(seed): _from_seed(first, seed)}, session)
    best = max(found, key=lambda seed: found[seed].quality)  # of equal ones the first
    if len(found) + len(session.problems) > 1:
        record = _record(best, found, session)
        found[best].trained.metrics["seeds"] = record
        logger.info("%s", in_words(record))
    return best, found


def in_words(record: Mapping[str, Any]) -> str:
    """Return what a record says of the seeds in one line."""
    numbers = ", ".join(
        f"{name} {mean:.4f}" + (f" \u00b1 {record['std'][name]:.4f}" if name in record["std"] else "")
        for name, mean in record["mean"].items()
    )
    return f"{len(record['runs'])} seeds: {numbers}; kept seed {record['kept']}, the best by the {record['by']}"


def _from_seed(first: Prepared, seed: int) -> Prepared:
    return first if seed == first.settings.seed else varied(first, replace(first.settings, seed=seed))


def _trained(runs: Mapping[str, Prepared], session: Session) -> dict[str, Seeded]:
    return {
        seed: Seeded(runs[seed], each, nothing_learnt(runs[seed], each.metrics, each.history))
        for seed, each in session.train(runs).items()
    }


def _record(best: str, found: Mapping[str, Seeded], session: Session) -> dict[str, Any]:
    """Return what the metrics of the kept prompt say of all: each one's, means and standard deviations (n - 1)."""
    runs: dict[str, dict[str, Any]] = {}
    for seed, each in found.items():
        metrics = each.trained.metrics
        runs[seed] = {name: metrics[name] for name in ("loss", "validation") if name in metrics}
        if each.nothing_learnt:
            runs[seed]["nothing_learnt"] = each.nothing_learnt
    values: dict[str, Sequence[float]] = {"training loss": [run["loss"] for run in runs.values()]}
    measured = [run.get("validation", {}) for run in runs.values()]
    values |= {f"validation {name}": [each[name] for each in measured] for name in measured[0]}
    others = [each.trained.metrics["seconds_by_part"] for seed, each in found.items() if seed != best]
    decisive = next((name for name in ("accuracy", "loss") if name in measured[0]), None)
    return {
        "kept": int(best),
        "by": f"validation {decisive}" if decisive else "training loss, as there is no validation data",
        "mean": {name: fmean(each) for name, each in values.items()},
        "std": {name: stdev(each) for name, each in values.items() if len(each) > 1},
        "runs": runs | {seed: {"problem": str(each)} for seed, each in session.problems.items()},
        "seconds_by_part": {name: sum(each[name] for each in others) for name in ("training", "validation")},
    }
