"""How far virtual tokens moved in training: what the history noted, and the start made again from its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from softprompt.artifacts import started_prompt
from softprompt.engine import completed
from softprompt.errors import ConfigError
from softprompt.prompts import PromptTuningConfig, drift

if TYPE_CHECKING:
    from softprompt.artifacts import StoredPrompt
    from softprompt.backbone import Base

_REMADE = ("PROMPT_TUNING", "EXTENDED_PROMPT_TUNING")
_ORDINARY = ("RANDOM", "RANDOM_SCALED", "TEXT", "SAMPLE_VOCAB", "LABELS")
"""Initialisations that need the base and the seed alone."""
_DIGITS = 0.02
"""Relative difference that rounding and another machine may make."""


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


@dataclass(frozen=True, slots=True)
class FirstValues:
    """The stored virtual tokens against the first values, made again from configuration and seed.

    Attributes:
        drift: Root mean square of what training changed, of each virtual token ``[P]``.
        cosines: Cosine of each virtual token with its first values ``[P]``.
        confirmed: Whether the drift that training noted is the same; False where it noted none.
    """

    drift: tuple[float, ...]
    cosines: tuple[float, ...]
    confirmed: bool


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


def first_values(stored: StoredPrompt, base: Base, values: Tensor, noted: Drift | None) -> FirstValues:
    """Make the first values of a prompt again, and compare the stored ones ``[P, H]`` with them.

    Raises:
        ConfigError: They need more than configuration, base and seed, or training noted another drift.
        SoftPromptError: The base does not support the configuration.
    """
    start = _remade(stored, base)
    if start.shape != values.shape:
        raise ConfigError(f"the start made again is {list(start.shape)}, the prompt {list(values.shape)}")
    moved = drift(start, values)
    confirmed = noted is not None and noted.kept in noted.epochs
    if noted is not None and confirmed:
        there = torch.tensor(noted.drift[noted.epochs.index(noted.kept or 0)])
        here = torch.tensor(moved[:: noted.every])
        if here.shape != there.shape or bool(((here - there).abs() > _DIGITS * there.max()).any()):
            raise ConfigError("made again from the recorded seed the start is not the one that training noted")
    return FirstValues(tuple(moved), tuple(cosine_similarity(start, values).tolist()), confirmed)


def _remade(stored: StoredPrompt, base: Base) -> Tensor:
    config = stored.configuration()
    seed = stored.manifest.settings.get("seed") if stored.manifest else None
    if not isinstance(config, PromptTuningConfig) or config.peft_type not in _REMADE:
        raise ConfigError(f"the start of a {stored.config['peft_type']} prompt is not made again")
    if config.prompt_tuning_init not in _ORDINARY:
        raise ConfigError(f"a start of the kind {config.prompt_tuning_init} needs more than a seed")
    if not isinstance(seed, int) or not base.name:
        raise ConfigError("the prompt records no seed, or its base has no name")
    reads = config.tokenizer_name_or_path is not None  # the base's own: an artifact names files of other machines
    config = replace(config, inference_mode=False, tokenizer_name_or_path=base.name if reads else None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return started_prompt(completed(config, base), base.model).prompt().by_token.detach().float().cpu()
