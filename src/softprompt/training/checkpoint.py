"""The resume state on disk: one safetensors file, so that it is never half of two things.

The prompt, the best prompt and the optimiser's tensors are the file's tensors; position, counts,
history and the optimiser's numbers are JSON in its header.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import Parameter

from softprompt.artifacts.files import write_atomically
from softprompt.errors import TrainingError
from softprompt.training.state import RunState

STATE_DIRECTORY = ".state"
STATE_FILE = "state.safetensors"
FORMAT = 2


def state_path(output: Path) -> Path:
    """Return where an output directory keeps its resume state."""
    return output / STATE_DIRECTORY / STATE_FILE


def save_state(
    output: Path,
    state: RunState,
    prompt: Parameter,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
) -> None:
    """Write the state of a run atomically; ``identity`` says what it may be resumed with."""
    moments = optimizer.state_dict()["state"].get(0, {})
    tensors = {"prompt": prompt.detach()}
    if state.best_prompt is not None:
        tensors["best_prompt"] = state.best_prompt
    numbers = {}
    for name, value in moments.items():
        if isinstance(value, Tensor):
            tensors[f"optimizer.{name}"] = value
        else:
            numbers[name] = value
    header = {"format": FORMAT, "run": state.to_dict(), "optimizer": numbers, "identity": identity}
    path = state_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(on_cpu, metadata={"state": json.dumps(header)}))


def load_state(
    output: Path, prompt: Parameter, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> RunState:
    """Read a state back into the prompt and its optimiser.

    Raises:
        TrainingError: there is no state, it is damaged, or it belongs to other data, another base
            or other settings.
    """
    header, tensors = _read(state_path(output))
    for name, expected in header["identity"].items():
        if identity.get(name) != expected:
            raise TrainingError(
                f"cannot resume {output}: its {name} was {expected!r}, now it is "
                f"{identity.get(name)!r}; restore it, or start again with overwrite"
            )
    with torch.no_grad():
        prompt.copy_(tensors["prompt"])
    moments: dict[str, Any] = dict(header["optimizer"])
    moments |= {
        name.removeprefix("optimizer."): tensor
        for name, tensor in tensors.items()
        if name.startswith("optimizer.")
    }
    if moments:
        saved = optimizer.state_dict()
        optimizer.load_state_dict({**saved, "state": {0: moments}})
    state = RunState(**header["run"])
    if "best_prompt" in tensors:
        state.best_prompt = tensors["best_prompt"].to(prompt.device)
    return state


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
