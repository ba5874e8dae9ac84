"""The plain rows behind a stored prompt, for formats that hold nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softprompt.artifacts.layout import PROMPT_KEY
from softprompt.artifacts.manifest import manifest_of_task
from softprompt.artifacts.native import StoredAdapter
from softprompt.artifacts.parts import ANSWER, INPUT, beyond_rows, placed_rows
from softprompt.artifacts.peft_layouts import COLS_KEY, LAYOUTS, ROWS_KEY
from softprompt.errors import ArtifactError, ConfigError, nearest
from softprompt.prompts import PeftType, Placement, TaskType


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """Rows ``[P, H]`` that stand before the input, and before the decoder's start token.

    Attributes:
        encoder: Rows before a seq2seq model's input.
        decoder: Rows before a causal model's input, or a seq2seq model's answer.
        seq2seq: Which of the two kinds the base is.
        stored: The prompt they come from, one task of it.
    """

    encoder: Tensor | None
    decoder: Tensor | None
    seq2seq: bool
    stored: StoredAdapter

    @property
    def input_rows(self) -> Tensor:
        """The rows before the input.

        Raises:
            ArtifactError: The prompt stands before the decoder's answer only, or as well.
        """
        rows = self.encoder if self.seq2seq else self.decoder
        if rows is None or (self.seq2seq and self.decoder is not None):
            raise ArtifactError(
                f"{self.stored.location} has rows for the decoder of a seq2seq model, which this "
                "format has no place for; convert it to caikit or tgis"
            )
        return rows


def single_task(stored: StoredAdapter, task: str | None) -> StoredAdapter:
    """Return one task of a multitask prompt as a plain prompt; any other prompt as it is.

    The rows are ``prompt_embeddings * (cols[k] @ rows[k])`` (Wang et al. 2023), in float32.

    Args:
        stored: the prompt.
        task: a number or a recorded name; needed when there are several.

    Raises:
        ConfigError: a task for a prompt that has none, no task, or one it does not have.
    """
    if stored.config["peft_type"] != PeftType.MULTITASK_PROMPT_TUNING:
        if task is not None:
            raise ConfigError(
                f"a task ({task!r}) selects a part of a multitask prompt, {stored.location} is "
                f"{stored.config['peft_type']}; leave the task out"
            )
        return stored
    index = _task_index(stored, task)
    shared, cols, rows = (stored.tensors[key].float() for key in (PROMPT_KEY, COLS_KEY, ROWS_KEY))
    tensors = {name: t for name, t in stored.tensors.items() if name not in (COLS_KEY, ROWS_KEY)}
    tensors[PROMPT_KEY] = shared * (cols[index] @ rows[index])
    keys = LAYOUTS[PeftType.PROMPT_TUNING].keys
    config: dict[str, Any] = {name: v for name, v in stored.config.items() if name in keys}
    config |= {"peft_type": str(PeftType.PROMPT_TUNING), "prompt_tuning_init": "RANDOM"}
    for name in ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):
        config[name] = None
    manifest = stored.manifest
    if manifest is not None:
        manifest = dataclasses.replace(manifest_of_task(manifest, index), tasks=None)
    return StoredAdapter(config, tensors, manifest, stored.location)


def plain_prompt(stored: StoredAdapter, kind: str) -> PlainPrompt:
    """Return the rows of a prompt of one task for the format ``kind``.

    Raises:
        ArtifactError: rows alone would be another model than this prompt; the reason says why.
    """
    config = stored.config
    reason = _inexpressible(stored)
    if reason is not None:
        raise ArtifactError(f"{stored.location} cannot be written as {kind}: {reason}")
    rows = placed_rows(stored)
    if config.get("task_type") != TaskType.SEQ_2_SEQ_LM:
        return PlainPrompt(None, rows[INPUT], False, stored)
    return PlainPrompt(rows.get(INPUT), rows.get(ANSWER), True, stored)


def beyond_peft(stored: StoredAdapter) -> str | None:
    """Return why PEFT would run another model than this prompt; None when it runs this one."""
    if stored.config["peft_type"] == PeftType.EXTENDED_PROMPT_TUNING:
        return "PEFT would run another model, because it lacks the options it has (adapter_config.json)"
    return None


def _inexpressible(stored: StoredAdapter) -> str | None:
    config = stored.config
    placement = config.get("placement", Placement.PREFIX)
    if config.get("task_type") not in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        return f"it is for {config.get('task_type')}, the format for models that write text"
    more = beyond_rows(stored)
    if more is not None:
        return f"{more}; only peft holds those"
    if placement != Placement.PREFIX:
        return f"the format puts rows before the input, this prompt stands elsewhere ({placement})"
    if not config.get("prompt_sees_input", True):
        return (
            "the format lets the prompt attend to the input, this one does not (prompt_sees_input)"
        )
    return None


def _task_index(stored: StoredAdapter, task: str | None) -> int:
    count = len(stored.tensors[COLS_KEY])
    names = (stored.manifest.tasks if stored.manifest else None) or ()
    known = ", ".join(names) or f"0 to {count - 1}"
    if task is None:
        if count == 1:
            return 0
        raise ConfigError(
            f"{stored.location} holds {count} tasks ({known}); name the one to convert: "
            "task_name=..., or --task-name on the command line"
        )
    if task in names:
        return names.index(task)
    if task.isdecimal() and int(task) < count:
        return int(task)
    raise ConfigError(
        f"{stored.location} has no task {task!r}{nearest(task, names)}; it has {known}"
    )


def bare_rows(rows: Tensor) -> Tensor:
    """Return rows as files of bare tensors hold them: a plain contiguous tensor on the CPU."""
    return rows.detach().cpu().contiguous().clone()
