"""The resume state on disk: one safetensors file, so that it is never half of two things.

The prompt's parameters, the best ones, the optimiser's tensors by parameter, and what earlier
stages left are the file's tensors; position, counts, history and the optimiser's numbers are JSON
in its header.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from softprompt.artifacts import write_atomically
from softprompt.errors import TrainingError
from softprompt.training.optimisation import trained
from softprompt.training.state import RunState

STATE_DIRECTORY = ".state"
STATE_FILE = "state.safetensors"
FORMAT = 3


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
        numbers: The optimiser's plain numbers by parameter.
        results: What finished stages came to, by their names.
    """

    stage: str
    run: RunState
    tensors: Mapping[str, dict[str, Tensor]]
    numbers: Mapping[str, dict[str, Any]]
    results: Mapping[str, Any]

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
        for name, parameter in trained(prompt).items():
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
        """Put parameters and optimiser back to where they were."""
        prompt.load_state_dict(self.tensors["prompt"])
        moments = {name: dict(values) for name, values in self.numbers.items()}
        for name, tensor in self.tensors["optimizer"].items():
            parameter, _, key = name.rpartition("/")
            moments.setdefault(parameter, {})[key] = tensor
        fresh = optimizer.state_dict()
        numbered = {
            number: moments[name] for number, name in enumerate(trained(prompt)) if name in moments
        }
        optimizer.load_state_dict({**fresh, "state": numbered})


def save_state(output: Path, snapshot: Snapshot, identity: Mapping[str, Any]) -> None:
    """Write the state of a run atomically; ``identity`` says what it may be resumed with."""
    header = {
        "format": FORMAT,
        "stage": snapshot.stage,
        "run": snapshot.run.to_dict(),
        "optimizer": snapshot.numbers,
        "results": snapshot.results,
        "identity": identity,
    }
    flat = {
        f"{kind}:{name}": tensor.detach().cpu().contiguous()
        for kind, tensors in snapshot.tensors.items()
        for name, tensor in tensors.items()
    }
    path = state_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(flat, metadata={"state": json.dumps(header)}))


def load_state(output: Path, identity: Mapping[str, Any]) -> Snapshot:
    """Read a state back.

    Raises:
        TrainingError: there is no state, it is damaged, or it belongs to other data, another base
            or other settings.
    """
    header, flat = _read(state_path(output))
    for name, expected in header["identity"].items():
        if identity.get(name) != expected:
            raise TrainingError(
                f"cannot resume {output}: its {name} was {expected!r}, now it is "
                f"{identity.get(name)!r}; restore it, or start again with overwrite"
            )
    tensors: dict[str, dict[str, Tensor]] = {
        kind: {} for kind in ("prompt", "best", "optimizer", "earlier")
    }
    for name, tensor in flat.items():
        kind, _, rest = name.partition(":")
        tensors[kind][rest] = tensor
    run = RunState(**header["run"], best=tensors["best"] or None)
    return Snapshot(header["stage"], run, tensors, header["optimizer"], header["results"])


def remove_state(output: Path) -> None:
    """Remove the resume state of a finished run."""
    shutil.rmtree(output / STATE_DIRECTORY, ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise TrainingError(
            f"nothing to resume: {path} does not exist; start the run without resume"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(
            f"the resume state {path} is damaged ({error}); start again with overwrite"
        ) from error
    if header.get("format") != FORMAT:
        raise TrainingError(
            f"the resume state {path} has format {header.get('format')!r}, this version reads "
            f"{FORMAT}; start again with overwrite"
        )
    return header, tensors
