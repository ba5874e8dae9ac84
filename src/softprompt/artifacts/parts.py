"""The rows of stored prompts, and whether two stored prompts can be put together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softprompt.artifacts.layout import OUR_KEYS, PROMPT_KEY
from softprompt.artifacts.native import StoredAdapter
from softprompt.backbone.fingerprint import Fingerprint
from softprompt.errors import ArtifactError, FingerprintError
from softprompt.prompts.kinds import PeftType, TaskType

_ROW_KINDS = (
    PeftType.PROMPT_TUNING,
    PeftType.EXTENDED_PROMPT_TUNING,
    PeftType.P_TUNING,
)
"""Methods whose file holds the prompt's rows and nothing that changes them."""


def rows_of(stored: StoredAdapter) -> Tensor:
    """Return the rows ``[S, P, H]`` of a stored prompt in float32.

    Raises:
        ArtifactError: If its value is not rows alone.
    """
    kind = stored.config.get("peft_type")
    if kind not in _ROW_KINDS:
        raise ArtifactError(
            f"{stored.location} holds a {kind} prompt, which is not [P, H] rows alone; only "
            f"{', '.join(_ROW_KINDS)} prompts can be composed or compared"
        )
    others = sorted(name for name in stored.tensors if name != PROMPT_KEY)
    if others:
        raise ArtifactError(
            f"{stored.location} holds more than a prompt ({', '.join(others[:2])}); trained heads cannot "
            "be composed, only prompts without them"
        )
    rows, length = stored.prompt.float(), int(stored.config["num_virtual_tokens"])
    if kind != PeftType.EXTENDED_PROMPT_TUNING and stored.config.get("task_type") == str(
        TaskType.SEQ_2_SEQ_LM
    ):
        rows = rows[:length]  # PEFT gives seq2seq prompts 2 P rows and reads the first P
    return rows.reshape(-1, length, rows.shape[1])


def options_of(stored: StoredAdapter) -> dict[str, Any]:
    """Return the options of a stored prompt that PEFT does not have."""
    return {key: stored.config[key] for key in sorted(OUR_KEYS) if stored.config.get(key)}


def other_base(first: StoredAdapter, second: StoredAdapter) -> str | None:
    """Return why two prompts are not of one base; None when they are.

    Fingerprints decide; where one of the prompts has none, the names of the bases do.
    """
    if first.prompt.shape[1] != second.prompt.shape[1]:
        return f"its rows are {second.prompt.shape[1]} wide, not {first.prompt.shape[1]}"
    if first.manifest is not None and second.manifest is not None:
        here, there = (
            Fingerprint.from_dict(each.manifest.base_fingerprint)
            for each in (first, second)
            if each.manifest is not None
        )
        if here.matches(there):
            return None
        return f"its base is {base_name(second)} ({there.short}), not {base_name(first)} ({here.short})"
    if base_name(first) != base_name(second):
        return f"its base is {base_name(second)}, not {base_name(first)}, and not both have a fingerprint"
    return None


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


def base_name(stored: StoredAdapter) -> str | None:
    """Return the recorded name of a prompt's base."""
    recorded = stored.manifest.base_model if stored.manifest else None
    name = recorded or stored.config.get("base_model_name_or_path")
    return None if name is None else str(name)
