"""Reading prompts back onto the base model they were made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter, load_adapter
from softprompt.attach.model import PeftModel
from softprompt.backbone.fingerprint import Fingerprint
from softprompt.backbone.load import LoadedBase, load_base
from softprompt.errors import ArtifactError, ConfigError
from softprompt.inference.detached import DetachedPrompt, detached_tasks
from softprompt.inference.tuned import TunedPrompt

_SOURCE_LENGTH = 256
_TARGET_LENGTH = 128
_FIRST = "default"


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
    (tuned,) = load_many(
        [directory],
        base_model,
        tokenizer=tokenizer,
        torch_dtype=torch_dtype,
        device=device,
        ignore_fingerprint=ignore_fingerprint,
    )
    return tuned


def load_many(
    directories: Sequence[str | Path],
    base_model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    ignore_fingerprint: bool = False,
) -> list[TunedPrompt]:
    """Load several prompts of one base model, which is loaded once; see ``load``.

    Args:
        directories: Folders of the prompts, or names on the Hub, at least one.
        base_model: As for ``load``; None takes the one on record with the first prompt.
        tokenizer: Used instead of the base model's own.
        torch_dtype: dtype of the base; None takes the recorded one, which must then be the same.
        device: Such as "cuda:0".
        ignore_fingerprint: Use prompts on a base they were not made for.

    Raises:
        ConfigError: No prompt is named, or the recorded dtypes differ.
        ArtifactError: A folder is missing or damaged, or the first names no base model.
        BackboneError: The base model cannot be loaded.
        FingerprintError: The base is not the one a prompt was made for.
    """
    found, base = _with_base(directories, base_model, tokenizer, torch_dtype, device)
    names = [_FIRST, *(f"prompt{number}" for number in range(2, len(found) + 1))]
    model = PeftModel.from_pretrained(
        base.model, found[0].location, names[0], ignore_fingerprint=ignore_fingerprint
    )
    for name, stored in zip(names[1:], found[1:], strict=True):
        model.load_adapter(stored.location, name, ignore_fingerprint=ignore_fingerprint)
    return [
        TunedPrompt(
            model,
            base.tokenizer,
            stored.manifest or _plain_manifest(stored, base.name, base.model),
            name,
        )
        for name, stored in zip(names, found, strict=True)
    ]


def load_detached(
    directories: Sequence[str | Path],
    base_model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    ignore_fingerprint: bool = False,
) -> list[DetachedPrompt]:
    """Load several prompts, of any kinds, beside one base model; see ``load_many``."""
    found, base = _with_base(directories, base_model, tokenizer, torch_dtype, device)
    prompts = []
    for stored in found:
        manifest = stored.manifest or _plain_manifest(stored, base.name, base.model)
        tasks = detached_tasks(stored, base, manifest, ignore_fingerprint=ignore_fingerprint)
        prompts.append(DetachedPrompt(base.model, base.tokenizer, manifest, tasks))
    return prompts


def _with_base(
    directories: Sequence[str | Path],
    base_model: str | Path | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    torch_dtype: str | torch.dtype | None,
    device: str | None,
) -> tuple[list[StoredAdapter], LoadedBase]:
    """Read prompts and their base, which is put into evaluation mode; see ``load_many``."""
    if isinstance(directories, str | Path) or not directories:
        raise ConfigError(f"expected the folders of one prompt or more, got {directories!r}")
    found = [load_adapter(directory) for directory in directories]
    named = recorded_base(found[0]) if base_model is None else base_model
    if torch_dtype is None and not isinstance(named, PreTrainedModel):
        torch_dtype = _recorded_dtype(found)
    base = load_base(
        named,
        tokenizer=tokenizer,
        seq2seq=_seq2seq(found[0]),
        torch_dtype=torch_dtype,
        device=device,
    )
    base.model.eval()  # type: ignore[no-untyped-call]
    return found, base


def _recorded_dtype(found: Sequence[StoredAdapter]) -> str | None:
    dtypes = sorted({stored.manifest.dtype for stored in found if stored.manifest is not None})
    if len(dtypes) > 1:
        raise ConfigError(
            f"the prompts were made for a base in {' and '.join(dtypes)}; choose with --torch-dtype "
            "(torch_dtype=... in Python)"
        )
    return dtypes[0] if dtypes else None


def recorded_base(stored: StoredAdapter) -> str:
    """Return the base that a prompt names.

    Raises:
        ArtifactError: It names none.
    """
    if stored.base_model is None:
        raise ArtifactError(
            f"{stored.location} does not say which base model it is for; pass base_model (--base-model)"
        )
    return stored.base_model


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
