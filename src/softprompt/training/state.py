"""Where a run is, in memory and on disk, and how it stops: all that resuming needs.

On disk it is one safetensors file, so that it is never half of two things: the prompt's parameters, the
best ones, the optimizer's tensors by parameter, and what earlier stages left are its tensors; position,
counts, history and the optimizer's numbers are JSON in its header.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from softprompt.artifacts import write_atomically
from softprompt.errors import TrainingError, TrainingInterrupted


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


STATE_DIRECTORY = ".state"
STATE_FILE = "state.safetensors"
PLAN_FILE = "plan.json"
"""What a run of another command than ``tune`` goes on by; its ``command`` names that."""
FORMAT = 5


def state_path(output: Path) -> Path:
    """Return where an output directory keeps its resume state."""
    return output / STATE_DIRECTORY / STATE_FILE


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
    path = state_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(flat, metadata={"state": json.dumps(header)}))


def load_states(output: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Snapshot], dict[str, Any]]:
    """Read back what ``save_states`` wrote: the snapshots and the record.

    Raises:
        TrainingError: there is no state, it is damaged, or it belongs to other data, another base
            or other settings.
    """
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


def remove_state(output: Path) -> None:
    """Remove the resume state of a finished run."""
    shutil.rmtree(output / STATE_DIRECTORY, ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise TrainingError(f"nothing to resume: {path} does not exist; start the run without resume=True")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(
            f"the resume state {path} is damaged ({error}); start again with overwrite=True"
        ) from error
    if header.get("format") != FORMAT:
        raise TrainingError(
            f"the resume state {path} has format {header.get('format')!r}, this version reads "
            f"{FORMAT}; start again with overwrite=True"
        )
    return header, tensors


logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While entered, notes the first Ctrl-C or SIGTERM; a second one acts at once.

    Signals can only be caught in the main thread; elsewhere `request` does the same.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
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
        """Stop here if the run is to be stopped.

        Raises:
            TrainingInterrupted: after a signal, or a call of `request`.
        """
        if self.requested:
            raise TrainingInterrupted("training was stopped")

    def _note(self, number: int, frame: FrameType | None) -> None:
        logger.info("stopping after this batch; a second Ctrl-C stops at once")
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def how_to_go_on(where: str, output: Path | None) -> str:
    """Return the sentence that ends an interrupted run: where it stopped, and what continues it."""
    if output is None:
        return f"training was stopped {where}; nothing is saved, since the run has no output directory"
    return f"training was stopped {where}; its state is saved, continue with: {resume_command(output)}"


def resume_command(output: Path) -> str:
    """Return the command that continues the run that was interrupted in a folder."""
    return f"softprompt {begun_by(output) or 'tune'} --resume --output {shlex.quote(str(output))}"


def begun_by(output: Path) -> str | None:
    """Return the command of the run that was interrupted in a folder; None where there is none to continue."""
    with suppress(OSError, ValueError, AttributeError):
        plan = json.loads(state_path(output).with_name(PLAN_FILE).read_text(encoding="utf-8"))
        return re.sub(r"\W", "", str(plan.get("command")))
    return "tune" if state_path(output).exists() else None


@contextmanager
def kept_if_resumable(output: Path | None) -> Iterator[None]:
    """Leave nothing of a run that ends inside without a state it could be continued from.

    One whose numbers are not finite would fail again, so its state goes too.

    Raises:
        TrainingInterrupted: after a second Ctrl-C, where the state of the last epoch is there.
    """
    try:
        yield
    except TrainingInterrupted:
        raise
    except BaseException as error:
        if output is None:
            raise
        failed = isinstance(error, TrainingError)
        if state_path(output).exists() and not failed:
            if isinstance(error, KeyboardInterrupt):
                raise TrainingInterrupted(how_to_go_on("at once", output)) from None
            raise
        remove_state(output)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        raise
