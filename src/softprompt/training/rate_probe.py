"""``learning_rate="auto"``: a few rates tried side by side for some updates, the best on held-out records kept.

Each is a short run from the same start with a whole schedule of its own. They are judged by the loss on validation
records, or where there are none on a share of the training records that the probe does not train on; never by the
loss they train on, by which the highest rate wins. The run then starts anew with the rate, as if it had been given.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from softprompt.errors import TrainingError, TrainingInterrupted
from softprompt.progress import phase
from softprompt.training.loop import train_together
from softprompt.training.output import SEAL, read_sealed, state_path, write_sealed
from softprompt.training.preparation import varied
from softprompt.training.session import candidate_of
from softprompt.world import world

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from softprompt.data import TokenRow
    from softprompt.training.loop import Candidate
    from softprompt.training.preparation import Prepared, TaskRows
    from softprompt.training.stage import Measure

logger = logging.getLogger(__name__)

FACTORS = (0.1, 0.3, 1.0, 3.0)
"""Of the method's default rate for this base."""
SHARE, LEAST_UPDATES, MOST_UPDATES = 8, 8, 40
"""Each rate has an eighth of the run's updates, within these limits."""
HELD_OUT, MOST_ROWS = 0.2, 256
"""Share of the training records that is held out where nothing else is, and the most records that judge."""
FILE = "learning_rate.json"


def with_rate(
    prepared: Prepared, output: Path | None, check_stop: Callable[[], None]
) -> tuple[Prepared, dict[str, Any]]:
    """Return a run with the rate that the probe chose, and what it adds to the metrics.

    Where a rate is set, the run is as it was and there is nothing to add. What was found is kept in the state of
    ``output``, where a resumed run finds it again.

    Raises:
        TrainingInterrupted: ``check_stop`` said so.
        TrainingError: No rate kept the loss finite.
    """
    settings = prepared.settings
    if not isinstance(settings.learning_rate, str):
        return prepared, {}
    kept = None if output is None else state_path(output).with_name(FILE)
    if (found := world().from_main(lambda: _kept(kept))) is None:
        try:
            with phase("trying rates", "trying learning rates"):
                found = probe(prepared, check_stop)
        except TrainingInterrupted:
            raise TrainingInterrupted(
                "training was stopped while learning rates were tried; nothing is saved yet, start it again"
            ) from None
        if kept is not None:
            write_sealed(kept, json.dumps({**SEAL, **found}).encode())
    return varied(prepared, replace(settings, learning_rate=found["learning_rate"])), {"learning_rate_probe": found}


def _kept(path: Path | None) -> dict[str, Any] | None:
    """Return what an interrupted run had found; None where there is nothing sound: it is found again."""
    with suppress(TrainingError, ValueError, TypeError, KeyError, RecursionError):
        found = {} if path is None else dict(json.loads(read_sealed(path)))
        del found["sha256"]
        if isinstance(rate := found["learning_rate"], float) and 0 < rate < math.inf:
            return found
    return None


def probe(prepared: Prepared, check_stop: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Try the rates and return what was found; the run itself is left as it was.

    Returns:
        ``learning_rate``, the best; ``rates``, each with its ``loss`` (nats per token, None where that was not
        finite); ``updates`` that each had; ``judged_by``, the records.

    Raises:
        TrainingError: No rate kept the loss finite.
    """
    whole = candidate_of(prepared).stage.total_updates()
    updates = min(whole, MOST_UPDATES, max(LEAST_UPDATES, whole // SHARE))
    tasks = [_judged(task, prepared.settings.seed, prepared.hidden) for task in prepared.tasks]
    own = all(task.validation for task in prepared.tasks)
    judged_by = (
        f"{sum(len(task.validation) for task in tasks)} {'validation' if own else 'held-out training'} records"
    )
    rates = [factor * prepared.rates.prompt for factor in FACTORS]
    shown = ", ".join(f"{rate:.3g}" for rate in rates)
    logger.info(
        "learning rates tried: %s, %d updates each, %.0f %% of the run together; the loss on %s decides",
        shown,
        updates,
        100 * updates * len(rates) / whole,
        judged_by,
    )
    candidates = [_candidate(replace(prepared, tasks=tasks), rate, updates, check_stop) for rate in rates]
    measures = [each.stage.validation for each in candidates]
    for each in candidates:
        each.stage = replace(each.stage, validation=None)  # once, at its end
    train_together(candidates, check_stop=check_stop)
    losses = [_loss(each, measure) for each, measure in zip(candidates, measures, strict=True)]
    for rate, loss in zip(rates, losses, strict=True):
        logger.info("  learning rate %-8.3g %s", rate, "not finite" if loss is None else f"loss {loss:.4f}")
    sound = [(loss, rate) for loss, rate in zip(losses, rates, strict=True) if loss is not None]
    if not sound:
        raise next(each.problem for each in candidates if each.problem is not None)
    best = min(sound)[1]
    logger.info("learning rate %.4g, the best of them", best)
    table = [{"learning_rate": rate, "loss": loss} for rate, loss in zip(rates, losses, strict=True)]
    return {"learning_rate": best, "rates": table, "updates": updates, "judged_by": judged_by}


def _candidate(prepared: Prepared, rate: float, updates: int, check_stop: Callable[[], None]) -> Candidate:
    """Return a short run from the start with a rate."""
    settings = replace(prepared.settings, learning_rate=rate, max_steps=updates, early_stopping_patience=None)
    rates, module = replace(prepared.rates, prompt=rate), copy.deepcopy(prepared.module)
    return candidate_of(replace(prepared, module=module, rates=rates, settings=settings), check_stop)


@torch.no_grad()
def _loss(candidate: Candidate, measure: Measure | None) -> float | None:
    """Return the loss of a trained candidate on the records that judge; None where it is not finite."""
    if candidate.problem is not None or measure is None:
        return None
    prompt = candidate.stage.prompt
    loss = measure.metrics([prompt.prompt(task) for task in range(prompt.num_tasks)])["loss"]
    return loss if math.isfinite(loss) else None


def _judged(task: TaskRows, seed: int, shown: Collection[TokenRow]) -> TaskRows:
    """Return a task with the records that judge a probe as its validation, drawn with the seed, none ``shown``."""
    draw = random.Random(f"rate_probe {seed}")
    if task.validation:
        rows = task.validation
        return replace(task, validation=rows if len(rows) <= MOST_ROWS else draw.sample(rows, MOST_ROWS))
    new = [i for i, row in enumerate(task.train) if row not in shown]
    count = min(MOST_ROWS, len(new), max(1, round(HELD_OUT * len(task.train))))
    held_out = set(draw.sample(new, count)) if len(task.train) > 1 else set()
    validation = [row for i, row in enumerate(task.train) if i in held_out] or task.train
    return replace(
        task, train=[row for i, row in enumerate(task.train) if i not in held_out], validation=validation
    )
