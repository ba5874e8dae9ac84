"""Where a run is, in memory and on disk, and how it stops: all that resuming needs.

On disk it is one safetensors file, so that it is never half of two things: the prompt's parameters, the
best ones, the optimizer's tensors by parameter, and what earlier stages left are its tensors; position,
counts, history and the optimizer's numbers are JSON in its header.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from softprompt.errors import TrainingError, TrainingInterrupted
from softprompt.training.output import SEAL, damaged, read_sealed, state_path, write_sealed
from softprompt.world import world


@dataclass(slots=True)
class Sums:
    """What one update adds up: losses in nats, target tokens, and all tokens."""

    targets: int
    tokens: int
    loss: float = 0.0
    penalty: float = 0.0


@dataclass
class RunState:
    """Position, counts and best result of a run, always at the border between two updates.

    ``epoch`` counts finished epochs, ``group`` the updates done in the current one, ``update`` all updates. Nothing
    random is kept: the order of the rows follows from (seed, epoch), dropout from (seed, update).
    """

    epoch: int = 0
    group: int = 0
    update: int = 0
    epoch_loss: float = 0.0  # sum over target tokens of the current epoch
    epoch_penalty: float = 0.0  # likewise, what distillation adds
    epoch_targets: int = 0
    learning_rate: float = 0.0  # of the last update
    tokens: int = 0
    seconds: float = 0.0  # of training
    validation_seconds: float = 0.0
    stale_epochs: int = 0
    best_epoch: int = 0
    best_quality: list[float] | None = None
    best: dict[str, Tensor] | None = None  # the prompt's parameters
    history: list[dict[str, Any]] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)  # of the first updates and the last, for the watch
    last_losses: list[float] = field(default_factory=list)
    collapse: dict[str, str] = field(default_factory=dict)  # what was found, by the sign
    streaks: dict[str, int] = field(default_factory=dict)  # validations in a row with a sign
    problem: str | None = None  # why it goes no further, where a number was not finite

    def add_update(self, sums: Sums, *, seconds: float, rate: float) -> None:
        """Count one finished update: its sums, its seconds, its learning rate."""
        self.learning_rate = rate
        self.group += 1
        self.update += 1
        self.epoch_loss += sums.loss
        self.epoch_penalty += sums.penalty
        self.epoch_targets += sums.targets
        self.tokens += sums.tokens
        self.seconds += seconds

    def add_epoch(self, point: dict[str, Any]) -> None:
        """Count one finished epoch and keep its point of the curve."""
        self.history.append(point)
        self.epoch += 1
        self.group = 0
        self.epoch_loss = 0.0
        self.epoch_penalty = 0.0
        self.epoch_targets = 0

    def offer(self, quality: list[float], parameters: Mapping[str, Tensor]) -> None:
        """Keep a prompt if it is better than the best so far; among equals the earlier stays."""
        if self.best_quality is not None and quality <= self.best_quality:
            self.stale_epochs += 1
            return
        self.best_quality = quality
        self.best_epoch, self.stale_epochs = self.epoch + 1, 0
        self.best = {name: value.detach().clone() for name, value in parameters.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tensors as JSON values."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "best"}

    @property
    def mean_loss(self) -> float:
        """Loss per target token of the current epoch so far, in nats."""
        return self.epoch_loss / max(self.epoch_targets, 1)

    @property
    def mean_penalty(self) -> float:
        """What distillation added per target token of the current epoch so far, in nats."""
        return self.epoch_penalty / max(self.epoch_targets, 1)

    @property
    def tokens_per_second(self) -> float:
        """Source and target tokens trained on per second, without validation."""
        return self.tokens / self.seconds if self.seconds else 0.0


FORMAT = 6


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is needed to go on.

    Attributes:
        stage: Name of the stage the run is in.
        run: Its state; ``best`` is among the tensors.
        tensors: ``prompt``, ``best``, ``optimizer`` and ``earlier``, each by name.
        numbers: The optimizer's plain numbers by parameter.
        results: Metrics of finished stages, by their names.
    """

    stage: str
    run: RunState
    tensors: Mapping[str, dict[str, Tensor]]
    numbers: Mapping[str, dict[str, Any]]
    results: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Seconds of training and validation so far, in all stages."""
        earlier = [float(each["seconds"]) for each in self.results.values()]
        return self.run.seconds + self.run.validation_seconds + sum(earlier)

    @classmethod
    def of(
        cls,
        stage: str,
        run: RunState,
        prompt: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        earlier: Mapping[str, Tensor] | None = None,
        results: Mapping[str, Any] | None = None,
    ) -> Snapshot:
        """Return the snapshot of a stage at the border of an update; tensors are not copied."""
        moments: dict[str, Tensor] = {}
        numbers: dict[str, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            (parameter,), name = group["params"], group["name"]
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    moments[f"{name}/{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        tensors = {
            "prompt": prompt.state_dict(),
            "best": run.best or {},
            "optimizer": moments,
            "earlier": dict(earlier or {}),
        }
        return cls(stage, run, tensors, numbers, dict(results or {}))

    def to_cpu(self) -> Snapshot:
        """Return it for a process that may not have the device of its tensors."""
        tensors = {kind: {name: each.cpu() for name, each in own.items()} for kind, own in self.tensors.items()}
        return replace(self, run=replace(self.run, best=tensors["best"] or None), tensors=tensors)

    def restore(self, prompt: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put parameters and optimizer back to where they were."""
        prompt.load_state_dict(self.tensors["prompt"])
        moments = {name: dict(values) for name, values in self.numbers.items()}
        for name, tensor in self.tensors["optimizer"].items():
            parameter, _, key = name.rpartition("/")
            moments.setdefault(parameter, {})[key] = tensor
        fresh = optimizer.state_dict()
        numbered = {
            number: moments[group["name"]]
            for number, group in enumerate(optimizer.param_groups)
            if group["name"] in moments
        }
        optimizer.load_state_dict({**fresh, "state": numbered})


def save_states(
    output: Path,
    snapshots: Mapping[str, Snapshot],
    identity: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write the states of runs that are trained together, by name, atomically.

    Args:
        output: Directory of the run.
        snapshots: Where each of them is.
        identity: What they may be resumed with.
        record: What else is needed to go on, as JSON values.
    """
    runs = {
        name: {"stage": each.stage, "run": each.run.to_dict(), "optimizer": each.numbers, "results": each.results}
        for name, each in snapshots.items()
    }
    header = {"format": FORMAT, "runs": runs, "identity": identity, "record": record or {}}
    flat = {
        f"{name}:{kind}:{key}": tensor.detach().cpu().contiguous()
        for name, snapshot in snapshots.items()
        for kind, tensors in snapshot.tensors.items()
        for key, tensor in tensors.items()
    }
    write_sealed(state_path(output), save(flat, metadata={"state": json.dumps(header), **SEAL}))


def load_states(output: Path | None, identity: Mapping[str, Any]) -> tuple[dict[str, Snapshot], dict[str, Any]]:
    """Read back what ``save_states`` wrote, the snapshots and the record; none where there is no state.

    Of several processes the first one reads.

    Raises:
        TrainingError: it is damaged, or it belongs to other data, another base or other settings.
    """
    return world().from_main(lambda: _loaded(output, identity))


def _loaded(output: Path | None, identity: Mapping[str, Any]) -> tuple[dict[str, Snapshot], dict[str, Any]]:
    if output is None or not state_path(output).exists():
        return {}, {}
    header, flat = _read(state_path(output))
    for name, expected in header["identity"].items():
        if identity.get(name) != expected:
            raise TrainingError(
                f"cannot resume {output}: its {name} was {expected!r}, now it is "
                f"{identity.get(name)!r}; restore it, or start again with overwrite=True"
            )
    kinds = ("prompt", "best", "optimizer", "earlier")
    tensors: dict[str, dict[str, dict[str, Tensor]]] = {
        name: {kind: {} for kind in kinds} for name in header["runs"]
    }
    for whole, tensor in flat.items():
        name, kind, key = whole.split(":", 2)
        tensors[name][kind][key] = tensor
    snapshots = {
        name: Snapshot(
            each["stage"],
            RunState(**each["run"], best=tensors[name]["best"] or None),
            tensors[name],
            each["optimizer"],
            each["results"],
        )
        for name, each in header["runs"].items()
    }
    return snapshots, header["record"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    data = read_sealed(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
        tensors = load(data)
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if header.get("format") != FORMAT:
        raise damaged(path, f"it has format {header.get('format')!r}, this version reads {FORMAT}")
    return header, tensors


logger = logging.getLogger(__name__)

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # SIGHUP: the terminal has gone; Windows has none

SECONDS_BETWEEN_SAVES = 30.0
_SHARE_OF_SAVING = 20
"""Times as long as a save took that the next one waits at least."""


@final
class Saving:
    """When the states of a run are saved: where epochs end, and between them after some updates or some time.

    Args:
        save: Writes the states.
        every: Updates after which they are saved; None goes by time.
    """

    def __init__(self, save: Callable[[], None], every: int | None = None) -> None:
        self._write, self._every = save, every
        self._updates, self._due = 0, time.monotonic() + SECONDS_BETWEEN_SAVES

    def now(self) -> None:
        """Save."""
        started = time.monotonic()
        self._write()
        ended = time.monotonic()
        self._updates, self._due = 0, ended + max(SECONDS_BETWEEN_SAVES, _SHARE_OF_SAVING * (ended - started))

    def updated(self) -> None:
        """Count an update of all candidates, and save where it is time."""
        self._updates += 1
        if self._updates >= self._every if self._every else time.monotonic() >= self._due:
            self.now()


class StopSignal:
    """While entered, notes the first Ctrl-C, SIGTERM or SIGHUP; a second one acts at once.

    Signals can only be caught in the main thread; elsewhere `request` does the same.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}
        self._terminal: list[int] = []

    def __enter__(self) -> Self:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            # What `nohup` lets a run ignore stays ignored.
            caught = [each for each in SIGNALS if each == signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN]
            self._terminal = [number for number in (1, 2) if os.isatty(number)]
            self._previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._restore()

    def request(self) -> None:
        """Ask the loop to stop before its next batch."""
        self.requested = True

    def check(self) -> None:
        """Stop here if the run is to be stopped, in any of its processes.

        Raises:
            TrainingInterrupted: after a signal, or a call of `request`.
        """
        self.requested = world().any(self.requested)
        if self.requested:
            raise TrainingInterrupted("training was stopped")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number not in (signal.SIGINT, signal.SIGTERM):  # writing to a terminal that has gone fails
            for gone in self._terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), gone)
        logger.info("stopping after this batch; a second Ctrl-C stops at once")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
