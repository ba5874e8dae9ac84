"""The stages of a distillation on disk: what is done is not repeated, and never mixed with anything else.

In the state folder of the output: ``plan.json`` is all that the run is made of, text and given questions
included, ``questions.json`` the questions so far, ``targets-N.safetensors`` what the teacher predicts for a block
of rows; the training has a state of its own. All of them carry the plan's digest.
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

from softprompt.errors import TrainingError, TrainingInterrupted, UsageError
from softprompt.training import (
    PLAN_FILE,
    SEAL,
    TopTargets,
    damaged,
    how_to_go_on,
    read_sealed,
    state_path,
    write_sealed,
)
from softprompt.world import world


@final
@dataclass(frozen=True, slots=True)
class Store:
    """What a run keeps between its stages.

    Attributes:
        output: The output directory; None keeps nothing.
        plan: What the run is made of, as plain values.
    """

    output: Path | None
    plan: Mapping[str, Any]

    @classmethod
    def found(cls, output: Path) -> Store:
        """Return that of the run that was interrupted in a folder.

        Raises:
            UsageError: There is none.
            TrainingError: Its plan is damaged.
        """
        path = state_path(output).with_name(PLAN_FILE)
        plan = _json(path) if path.exists() else {}
        if (command := plan.get("command")) != "distill":
            held = f"a run of {command}, none" if command else "no interrupted run"
            raise UsageError(f"nothing to resume in {output}: it holds {held} of distill")
        return cls(output, plan)

    @property
    def digest(self) -> str:
        """What the files of this run are known by."""
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Write the plan."""
        self._write(PLAN_FILE, json.dumps({**SEAL, **self.plan}, indent=2, ensure_ascii=False))

    def check(self, part: str, now: Any) -> None:
        """Raise ``TrainingError`` where a part of the plan has changed since it was written."""
        if (before := self.plan[part]) != now:
            raise TrainingError(
                f"cannot resume {self.output}: the base model's {part} was {before}, now it is {now}; restore it, "
                "or start again with overwrite=True"
            )

    def save_questions(self, values: Mapping[str, Any]) -> None:
        """Keep the questions as far as they have come."""
        self._write("questions.json", json.dumps({**SEAL, "digest": self.digest, **values}, ensure_ascii=False))

    def questions(self) -> dict[str, Any] | None:
        """Return what ``save_questions`` kept; None where there is nothing."""
        return world().from_main(self._questions)

    def _questions(self) -> dict[str, Any] | None:
        if (path := self._existing("questions.json")) is None:
            return None
        values = _json(path)
        self._require(values.pop("digest", None), path)
        return values

    def save_targets(self, block: int, targets: Sequence[TopTargets]) -> None:
        """Keep what the teacher predicts for the rows of a block."""
        whole, counts = TopTargets.joined(targets), [len(each) for each in targets]
        tensors = {"ids": whole.ids, "log_probs": whole.log_probs, "tail": whole.tail}
        tensors["ends"] = torch.tensor(counts).cumsum(0)
        self._write(_targets(block), save(tensors, metadata={**SEAL, "digest": self.digest}))

    def targets(self, block: int) -> list[TopTargets] | None:
        """Return what ``save_targets`` kept of a block; None where there is nothing."""
        return world().from_main(lambda: self._block(block))

    def _block(self, block: int) -> list[TopTargets] | None:
        if (path := self._existing(_targets(block))) is None:
            return None
        read_sealed(path)
        try:
            with safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get("digest")
                whole = TopTargets(*(file.get_tensor(name) for name in ("ids", "log_probs", "tail")))
                ends = file.get_tensor("ends").tolist()
        except (SafetensorError, OSError) as error:
            raise damaged(path, str(error)) from error
        self._require(digest, path)
        return [whole.part(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @contextmanager
    def interrupted(
        self, where: str, kinds: tuple[type[BaseException], ...] = (TrainingInterrupted, KeyboardInterrupt)
    ) -> Iterator[None]:
        """Say how to go on where the work inside is stopped by one of ``kinds``; ``where`` is what it was at."""
        try:
            yield
        except kinds:
            raise TrainingInterrupted(how_to_go_on(where, self.output)) from None

    def _existing(self, name: str) -> Path | None:
        path = None if self.output is None else state_path(self.output).with_name(name)
        return path if path is not None and path.exists() else None

    def _write(self, name: str, data: bytes | str) -> None:
        if self.output is not None:
            write_sealed(
                state_path(self.output).with_name(name), data if isinstance(data, bytes) else data.encode()
            )

    def _require(self, digest: Any, path: Path) -> None:
        if digest != self.digest:
            raise TrainingError(f"cannot resume: {path} belongs to another run; start again with overwrite=True")


def _targets(block: int) -> str:
    return f"targets-{block}.safetensors"


def _json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = dict(json.loads(read_sealed(path)))
        del values["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    return values
