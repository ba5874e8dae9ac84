"""The stages of a distillation on disk: what is done is not repeated, and never mixed with anything else.

In the state folder of the output: ``plan.json`` says what the run is made of, ``questions.json`` holds the questions
so far, ``targets-N.safetensors`` what the teacher predicts for a block of rows; the training has a state of its own.
All but the plan carry the plan's digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from softprompt.artifacts import write_atomically
from softprompt.errors import TrainingError, TrainingInterrupted, UsageError
from softprompt.training import PLAN_FILE, TopTargets, how_to_go_on, state_path

COMMAND = "distill"
QUESTIONS_NAME = "questions.jsonl"
"""The questions in the finished output."""


@final
@dataclass(frozen=True, slots=True)
class Store:
    """What a run keeps between its stages; without an output directory nothing.

    Attributes:
        output: The output directory; None keeps nothing.
        identity: What may not change before the run is done, by the names of its parts.
    """

    output: Path | None
    identity: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """What the files of this run are known by."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def begin(self, values: Mapping[str, Any]) -> None:
        """Write the plan: ``values`` repeat the run."""
        plan = {"command": COMMAND, "identity": dict(self.identity), **values}
        self._write(PLAN_FILE, json.dumps(plan, indent=2, ensure_ascii=False))

    def check(self) -> None:
        """Refuse to go on with something else than what was begun.

        Raises:
            TrainingError: A part has changed since; it is named.
        """
        assert self.output is not None
        before = plan_of(self.output)["identity"]
        for name, now in self.identity.items():
            if before.get(name) != now:
                raise TrainingError(
                    f"cannot resume {self.output}: its {name} was {before.get(name)!r}, now it is {now!r}; restore "
                    "it, or start again with overwrite=True"
                )

    def save_study(self, values: Mapping[str, Any]) -> None:
        """Keep the questions as far as they have come."""
        self._write("questions.json", json.dumps({"plan": self.digest, **values}, ensure_ascii=False))

    def study(self) -> dict[str, Any] | None:
        """Return what ``save_study`` kept; None where there is nothing."""
        path = self._path("questions.json")
        if path is None or not path.exists():
            return None
        values = _json(path)
        self._require(values.pop("plan", None), path)
        return values

    def save_targets(self, block: int, targets: Sequence[TopTargets]) -> None:
        """Keep what the teacher predicts for the rows of a block."""
        if self.output is None:
            return
        whole = TopTargets.joined(targets)
        tensors = {"ids": whole.ids, "log_probs": whole.log_probs, "tail": whole.tail}
        tensors["tokens"] = torch.tensor([len(each) for each in targets], dtype=torch.int32)
        self._write(f"targets-{block}.safetensors", save(tensors, metadata={"plan": self.digest}))

    def targets(self, block: int) -> list[TopTargets] | None:
        """Return what ``save_targets`` kept of a block; None where there is nothing."""
        path = self._path(f"targets-{block}.safetensors")
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                plan = (file.metadata() or {}).get("plan")
                whole = TopTargets(*(file.get_tensor(name) for name in ("ids", "log_probs", "tail")))
                ends = file.get_tensor("tokens").cumsum(0).tolist()
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        self._require(plan, path)
        return [whole.part(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @contextmanager
    def interrupted(self, where: str) -> Iterator[None]:
        """Say how to go on where the work inside is stopped; ``where`` is what it was at."""
        try:
            yield
        except (TrainingInterrupted, KeyboardInterrupt) as error:
            said = str(error)  # the training says more of where it was
            told = said if "training was stopped " in said else how_to_go_on(where, self.output)
            raise TrainingInterrupted(told) from None

    def _path(self, name: str) -> Path | None:
        return None if self.output is None else state_path(self.output).with_name(name)

    def _write(self, name: str, data: bytes | str) -> None:
        if (path := self._path(name)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)

    def _require(self, plan: Any, path: Path) -> None:
        if plan != self.digest:
            raise TrainingError(f"cannot resume: {path} belongs to another run; start again with overwrite=True")


def plan_of(output: Path) -> dict[str, Any]:
    """Return the plan of the run that was interrupted in a folder.

    Raises:
        UsageError: There is none.
        TrainingError: It is damaged.
    """
    path = state_path(output).with_name(PLAN_FILE)
    if not path.exists():
        raise UsageError(
            f"nothing to resume in {output}: it holds no interrupted run of distill; start it without resume=True"
        )
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return values


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(f"the resume state {path} is damaged ({error}); start again with overwrite=True")
