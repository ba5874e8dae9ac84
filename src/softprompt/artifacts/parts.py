"""The rows of stored prompts, where they stand, and whether two prompts can be put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt.artifacts.layout import OUR_KEYS, PROMPT_KEY
from softprompt.artifacts.native import StoredAdapter
from softprompt.artifacts.recorded_base import RecordedBase
from softprompt.errors import ArtifactError, FingerprintError
from softprompt.prompts import KEY_VALUE_METHODS, PeftType, TaskType

INPUT, ANSWER = "input", "answer"
"""Where rows stand: before what the model reads, or before a seq2seq model's answer."""


def places_of(model_types: Sequence[str] | None, *, seq2seq: bool) -> tuple[str, ...]:
    """Return where the rows of a prompt with these ``output_model_types`` stand."""
    if not seq2seq or model_types is None:
        return (INPUT,)
    named = {"ENCODER": INPUT, "DECODER": ANSWER}
    return tuple(place for kind, place in named.items() if kind in model_types)


def placed_rows(stored: StoredAdapter) -> dict[str, Tensor]:
    """Return the rows ``[P, H]`` that are run, by the place they stand at.

    PEFT gives seq2seq prompts 2 P rows and reads the first P; only ``output_model_types`` of both
    parts means two.
    """
    rows, config = stored.prompt, stored.config
    seq2seq = config.get("task_type") == TaskType.SEQ_2_SEQ_LM
    places = places_of(config.get("output_model_types"), seq2seq=seq2seq)
    if not seq2seq:
        return {INPUT: rows}
    length = int(config["num_virtual_tokens"])
    return {place: rows[i * length : (i + 1) * length] for i, place in enumerate(places)}


def beyond_rows(stored: StoredAdapter) -> str | None:
    """Return why a stored prompt is more than the rows of one task; None when it is those."""
    kind = stored.config["peft_type"]
    if kind in KEY_VALUE_METHODS:
        return "it is keys and values of every layer, not rows of the input"
    if kind == PeftType.MULTITASK_PROMPT_TUNING:
        return "it holds the factors of its tasks; write one with `convert --to softprompt --task`"
    heads = sorted(name for name in stored.tensors if name != PROMPT_KEY)
    if heads:
        return f"it has trained parts besides its rows ({', '.join(heads[:3])})"
    return None


def rows_of(stored: StoredAdapter) -> Tensor:
    """Return the rows ``[S, P, H]`` of a stored prompt in float32.

    Raises:
        ArtifactError: If its value is not rows alone.
    """
    reason = beyond_rows(stored)
    if reason is not None:
        raise ArtifactError(
            f"{stored.location} cannot be composed, compared or started from: {reason}"
        )
    return torch.stack([rows.float() for rows in placed_rows(stored).values()])


def options_of(stored: StoredAdapter) -> dict[str, Any]:
    """Return the options of a stored prompt that PEFT does not have."""
    return {key: stored.config[key] for key in sorted(OUR_KEYS) if stored.config.get(key)}


def other_base(first: StoredAdapter, second: StoredAdapter) -> str | None:
    """Return why two prompts are not of one base; None when they are."""
    return RecordedBase.of_stored(first).differs(RecordedBase.of_stored(second))


def other_places(stored: StoredAdapter, wanted: Sequence[str]) -> str | None:
    """Return why a prompt's rows do not stand where they are wanted; None when they do."""
    found = tuple(placed_rows(stored))
    if found == tuple(wanted):
        return None
    return f"its rows stand before the {' and the '.join(found)}, not before the {' and the '.join(wanted)}"


def require_one_base(first: StoredAdapter, second: StoredAdapter) -> None:
    """Refuse prompts of different bases.

    Raises:
        FingerprintError: With the reason.
    """
    reason = other_base(first, second)
    if reason is not None:
        raise FingerprintError(
            f"{second.location} cannot go together with {first.location}: {reason}; use prompts of one base"
        )
