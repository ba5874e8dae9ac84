"""How far virtual tokens moved in training, as its history notes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Drift:
    """What training noted after each epoch of every ``every``-th virtual token: root mean squares over its values.

    Attributes:
        epochs: Numbers of the epochs (E).
        every: 1 but for prompts of more than 128 virtual tokens.
        drift: Of the change since the start ``[E, P]``.
        rms: Of the values ``[E, P]``.
        kept: The epoch whose prompt is the stored one; None where that is not recorded.
    """

    epochs: tuple[int, ...]
    every: int
    drift: tuple[tuple[float, ...], ...]
    rms: tuple[tuple[float, ...], ...]
    kept: int | None


def drift_of(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Drift:
    """Return what a history notes of the virtual tokens.

    Raises:
        ConfigError: Nothing, as of prompts that were trained before such notes; or it is damaged.
    """
    points = [point for point in history if isinstance(point, Mapping) and "virtual_tokens" in point]
    if not points:
        raise ConfigError("the training history has no notes of the virtual tokens")
    try:
        notes = [point["virtual_tokens"] for point in points]
        kept = metrics.get("epoch")
        found = Drift(
            epochs=tuple(int(point["epoch"]) for point in points),
            every=int(notes[0]["every"]),
            drift=tuple(tuple(map(float, each["drift"])) for each in notes),
            rms=tuple(tuple(map(float, each["rms"])) for each in notes),
            kept=kept if isinstance(kept, int) else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the notes of the virtual tokens in the training history are damaged: {error!r}"
        ) from error
    if len({len(row) for row in (*found.drift, *found.rms)}) > 1 or not found.drift[0] or found.every < 1:
        raise ConfigError("the notes of the virtual tokens in the training history are damaged")
    return found
