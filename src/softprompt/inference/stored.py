"""Saved prompts, read together with the base model they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts import Manifest, Origin, StoredPrompt, load_adapter, manifest_of
from softprompt.backbone import Base, load_base
from softprompt.errors import ArtifactError, ConfigError

_SEQ2SEQ = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}


def stored_prompts(
    directories: Sequence[str | Path],
    base_model: str | Path | PreTrainedModel | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
) -> tuple[list[StoredPrompt], Base]:
    """Read prompts, and their base once, which is put into evaluation mode; see ``load_many``."""
    found = [load_adapter(directory) for directory in directories]
    kinds = [_is_seq2seq(stored) for stored in found]
    named = recorded_base(found[0]) if base_model is None else base_model
    if torch_dtype is None and not isinstance(named, PreTrainedModel):
        torch_dtype = _recorded_dtype(found)
    base = load_base(
        named, tokenizer=tokenizer, seq2seq=kinds[0], torch_dtype=torch_dtype, device=device
    )
    base.model.eval()  # type: ignore[no-untyped-call]
    return found, base


def recorded_base(stored: StoredPrompt) -> str:
    """Return the base that a prompt names.

    Raises:
        ArtifactError: It names none.
    """
    if stored.base_model is None:
        raise ArtifactError(
            f"{stored.location} does not say which base model it is for; pass base_model (--base-model)"
        )
    return stored.base_model


def record_of(stored: StoredPrompt, base: Base) -> Manifest:
    """Return a prompt's record; of a folder that PEFT wrote, that its input is put as it is."""
    return stored.manifest or manifest_of(Origin.of_base(base), base)


def _recorded_dtype(found: Sequence[StoredPrompt]) -> str | None:
    dtypes = sorted({stored.manifest.dtype for stored in found if stored.manifest is not None})
    if len(dtypes) > 1:
        raise ConfigError(
            f"the prompts were made for a base in {' and '.join(dtypes)}; choose with --torch-dtype "
            "(torch_dtype=... in Python)"
        )
    return dtypes[0] if dtypes else None


def _is_seq2seq(stored: StoredPrompt) -> bool:
    task = stored.config.get("task_type")
    if task not in _SEQ2SEQ:
        raise ArtifactError(
            f"expected a prompt for CAUSAL_LM or SEQ_2_SEQ_LM in {stored.location}, got task_type "
            f"{task}; attach it with PeftModel.from_pretrained"
        )
    return _SEQ2SEQ[task]
