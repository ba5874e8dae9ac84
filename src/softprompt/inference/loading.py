"""Reading a prompt back onto the base model it was made for."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter, load_adapter
from softprompt.attach.model import PeftModel
from softprompt.backbone.fingerprint import Fingerprint
from softprompt.backbone.load import load_base
from softprompt.errors import ArtifactError
from softprompt.inference.tuned import TunedPrompt

_SOURCE_LENGTH = 256
_TARGET_LENGTH = 128


def load(
    directory: str | Path,
    base_model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    ignore_fingerprint: bool = False,
) -> TunedPrompt:
    """Load a prompt that softprompt or PEFT wrote, with its base model, ready to use.

    A folder without ``softprompt.json`` is PEFT's own: its input is put as it is
    (``{{input}}``), and it generates.

    Args:
        directory: Folder of the prompt, or ``org/name`` on the Hub.
        base_model: Folder, Hub id, or a model in memory, which is put into evaluation mode;
            None takes the one on record.
        tokenizer: Used instead of the base model's own.
        torch_dtype: dtype of the base; None takes the recorded one, or leaves a model in
            memory as it is.
        device: Such as "cuda:0"; None is the CPU, or where a model in memory is.
        ignore_fingerprint: Use the prompt on a base it was not made for.

    Raises:
        ArtifactError: The folder is missing or damaged, or names no base model.
        BackboneError: The base model cannot be loaded.
        FingerprintError: The base is not the one the prompt was made for.
    """
    stored = load_adapter(directory)
    named = _recorded_base(stored) if base_model is None else base_model
    manifest = stored.manifest
    if torch_dtype is None and manifest is not None and not isinstance(named, PreTrainedModel):
        torch_dtype = manifest.dtype
    base = load_base(
        named,
        tokenizer=tokenizer,
        seq2seq=_seq2seq(stored),
        torch_dtype=torch_dtype,
        device=device,
    )
    if manifest is None:
        manifest = _plain_manifest(stored, base.name, base.model)
    base.model.eval()  # type: ignore[no-untyped-call]
    model = PeftModel.from_pretrained(
        base.model, stored.location, ignore_fingerprint=ignore_fingerprint
    )
    return TunedPrompt(model, base.tokenizer, manifest)


def _recorded_base(stored: StoredAdapter) -> str:
    recorded = stored.manifest.base_model if stored.manifest else None
    name = recorded or stored.config.get("base_model_name_or_path")
    if not name:
        raise ArtifactError(
            f"{stored.location} does not say which base model it is for; pass base_model"
        )
    return str(name)


def _seq2seq(stored: StoredAdapter) -> bool:
    task = stored.config.get("task_type")
    if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ArtifactError(
            f"expected a prompt for CAUSAL_LM or SEQ_2_SEQ_LM in {stored.location}, got task_type "
            f"{task}; attach it with PeftModel.from_pretrained"
        )
    return bool(task == "SEQ_2_SEQ_LM")


def _plain_manifest(stored: StoredAdapter, base_name: str, model: PreTrainedModel) -> Manifest:
    return Manifest(
        template="{{input}}",
        task="generation",
        labels=None,
        base_model=base_name,
        base_fingerprint=Fingerprint.of(model).to_dict(),
        max_source_length=_SOURCE_LENGTH,
        max_target_length=_TARGET_LENGTH,
        dtype=str(model.dtype).removeprefix("torch."),
        seq2seq=_seq2seq(stored),
    )
