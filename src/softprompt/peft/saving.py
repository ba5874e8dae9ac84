"""Saves attached prompts to PEFT's folders, and loads them into attached prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softprompt.artifacts import Manifest, Origin, StoredPrompt, save_adapter, tensors_read
from softprompt.artifacts import manifest_of as made_manifest
from softprompt.backbone import HEAD, head_tensors
from softprompt.errors import ArtifactError
from softprompt.peft.adapters import heads_of
from softprompt.prompts import Parameterization, TaskType, check_fit, take_over

if TYPE_CHECKING:
    from softprompt.peft.model import PeftModel

logger = logging.getLogger(__name__)


def get_peft_model_state_dict(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return copies of what a saved prompt holds: ``prompt_embeddings`` ``[P·S, H]``, baked, and its heads.

    Raises:
        AdapterError: If there is no such prompt.
    """
    state = model.encoder_of(adapter_name).stored()
    heads = _heads(model, adapter_name)
    return state | {name: value.cpu().clone() for name, value in heads.items()}


def set_peft_model_state_dict(model: PeftModel, state: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Copy what ``get_peft_model_state_dict`` returned into an attached prompt, all of it or nothing.

    Raises:
        ArtifactError: If a value is missing, left over, or of another shape.
    """
    encoder, heads = model.encoder_of(adapter_name), _heads(model, adapter_name)
    own = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    given = {name: value for name, value in state.items() if name.startswith(HEAD)}
    left = sorted(given.keys() - heads.keys())
    if left:
        raise ArtifactError(
            f"the saved prompt holds {', '.join(left)}, which this model has no place for; "
            "name the module in modules_to_save"
        )
    check_fit(heads, given)
    config = model.peft_config[adapter_name]
    encoder.load_stored(tensors_read(own, config, seq2seq=model.base.is_encoder_decoder))
    take_over(heads, given)


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
        get_peft_model_state_dict(model, adapter),
        manifest_of(model, adapter),
        overwrite=True,
    )


def manifest_of(model: PeftModel, adapter: str) -> Manifest:
    """Return what our own file says of a prompt; a prompt trained by hand has no template but the text."""
    base, config = model.base, model.peft_config[adapter]
    known = model.manifests.get(adapter)
    if known is not None:
        return dataclasses.replace(known, base_fingerprint=base.fingerprint_record())
    dtype = str(base.dtype).removeprefix("torch.")
    origin = Origin(config.base_model_name_or_path or "", base.is_encoder_decoder, dtype=dtype)
    made = made_manifest(origin, base)
    generates = config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
    return made if generates else dataclasses.replace(made, task="classification")


def fill(model: PeftModel, adapter: str, stored: StoredPrompt, *, trainable: bool) -> None:
    """Give an attached prompt its saved values, frozen unless it is to be trained further."""
    set_peft_model_state_dict(model, stored.tensors, adapter)
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
            "the virtual tokens of a %s prompt are baked: training goes on with the tokens themselves", kind
        )
