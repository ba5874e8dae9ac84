"""Saves attached prompts to PEFT's folders, and loads them into attached prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softprompt.artifacts import Manifest, StoredPrompt, save_adapter, tensors_read
from softprompt.backbone import HEAD, head_tensors
from softprompt.errors import ArtifactError
from softprompt.peft.adapters import heads_of
from softprompt.prompts import Parameterization, TaskType, check_fit, take_over

if TYPE_CHECKING:
    from softprompt.peft.model import PeftModel

logger = logging.getLogger(__name__)

_MAX_TOKENS = (256, 128)
"""Input and answer lengths a manifest carries for a prompt that was trained outside ``tune``."""


def state_of(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return copies of what a saved prompt holds: its baked values and its heads, under PEFT's names."""
    state = model.encoder_of(adapter).stored()
    return state | {name: value.cpu().clone() for name, value in _heads(model, adapter).items()}


def load_state(model: PeftModel, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into an attached prompt and its heads, all of them or none.

    Raises:
        ArtifactError: If a value is missing, left over, or of another shape.
    """
    encoder = model.encoder_of(adapter)
    heads_of = _heads(model, adapter)
    own = {name: value for name, value in tensors.items() if not name.startswith(HEAD)}
    given = {name: value for name, value in tensors.items() if name.startswith(HEAD)}
    left = sorted(given.keys() - heads_of.keys())
    if left:
        raise ArtifactError(
            f"the saved prompt holds {', '.join(left)}, which this model has no place for; "
            "name the module in modules_to_save"
        )
    check_fit(heads_of, given)
    encoder.load_stored(
        tensors_read(own, model.peft_config[adapter], seq2seq=model.base.is_encoder_decoder)
    )
    take_over(heads_of, given)


def _heads(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the values of an adapter's heads under PEFT's names, sharing their memory."""
    return head_tensors(dict(heads_of(model.base_model, adapter)))


def save(model: PeftModel, adapter: str, directory: Path) -> None:
    """Write one prompt; see ``PeftModel.save_pretrained``."""
    target = directory if adapter == "default" else directory / adapter
    config = dataclasses.replace(model.peft_config[adapter], inference_mode=True)
    save_adapter(
        target,
        config.to_dict(),
        state_of(model, adapter),
        manifest_of(model, adapter),
        overwrite=True,
    )


def manifest_of(model: PeftModel, adapter: str) -> Manifest:
    """Return what our own file says of a prompt; a prompt trained by hand has no template but the text."""
    fingerprint = model.base.fingerprint.to_dict()
    known = model.manifests.get(adapter)
    if known is not None:
        return dataclasses.replace(known, base_fingerprint=fingerprint)
    config = model.peft_config[adapter]
    generates = config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
    return Manifest(
        template="{{input}}",
        task="generation" if generates else "classification",
        labels=None,
        base_model=config.base_model_name_or_path or "",
        base_fingerprint=fingerprint,
        max_source_length=_MAX_TOKENS[0],
        max_target_length=_MAX_TOKENS[1],
        dtype=str(model.base_model.dtype).removeprefix("torch."),
        seq2seq=model.base.is_encoder_decoder,
    )


def fill(model: PeftModel, adapter: str, stored: StoredPrompt, *, trainable: bool) -> None:
    """Give an attached prompt its saved values, frozen unless it is to be trained further."""
    load_state(model, adapter, stored.tensors)
    if stored.manifest is not None:
        # What was measured does not hold for values that are about to change.
        fresh: dict[str, Any] = {"metrics": {}, "history": []} if trainable else {}
        model.manifests[adapter] = dataclasses.replace(stored.manifest, **fresh)
    if trainable:
        _log_what_is_trained(stored)
        model.thaw(adapter)


def _log_what_is_trained(stored: StoredPrompt) -> None:
    """Log that the file of a parameterised prompt holds virtual tokens, as far as it is on record."""
    settings = stored.manifest.settings if stored.manifest is not None else {}
    kind = (settings.get("tuning_config") or {}).get("parameterization", Parameterization.DIRECT)
    if kind != Parameterization.DIRECT:
        logger.info(
            "the virtual tokens of a %s prompt are baked: training goes on with the tokens themselves",
            kind,
        )
