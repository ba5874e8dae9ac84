"""Between attached prompts and PEFT's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter, load_adapter, save_adapter
from softprompt.attach import heads
from softprompt.backbone.fingerprint import Fingerprint
from softprompt.errors import ArtifactError, FingerprintError
from softprompt.prompts.configs import PromptTuningConfig, TaskType

if TYPE_CHECKING:
    from softprompt.attach.model import PeftModel

PROMPT_KEY = "prompt_embeddings"
"""Name of the rows in PEFT's weights file."""

_HEAD = "base_model."
_MAX_TOKENS = (256, 128)
"""Input and answer lengths a manifest carries for a prompt that was trained outside ``tune``."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A prompt read from disk, in our terms."""

    config: PromptTuningConfig
    tensors: Mapping[str, Tensor]
    manifest: Manifest | None
    location: str


def state_of(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return copies of what a saved prompt holds: its rows and its heads, under PEFT's names."""
    state = {PROMPT_KEY: model.get_prompt_embedding_to_save(adapter).clone()}
    for path, head in heads.heads_of(model.base_model, adapter):
        for part, value in head.state_dict().items():
            state[f"{_HEAD}{path}.{part}"] = value.detach().cpu().clone()
    return state


def load_state(model: PeftModel, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into an attached prompt and its heads, all of them or none.

    Raises:
        ArtifactError: If a value is missing, left over, or of another shape.
    """
    left = dict(tensors)
    fitting: list[tuple[Tensor, Tensor]] = []
    targets: dict[str, Tensor] = {PROMPT_KEY: model.encoder_of(adapter).materialize()}
    for path, head in heads.heads_of(model.base_model, adapter):
        for part, own in head.state_dict().items():
            targets[f"{_HEAD}{path}.{part}"] = own
    for name, target in targets.items():
        if name not in left:
            raise ArtifactError(
                f"the saved prompt lacks {name}, expected {list(target.shape)}; save it again"
            )
        value = left.pop(name)
        if name == PROMPT_KEY and model.facts.is_encoder_decoder:
            # PEFT gives seq2seq prompts 2 P rows and reads the first P.
            value = value[: target.shape[0]] if len(value) == 2 * len(target) else value
        if value.shape != target.shape:
            raise ArtifactError(
                f"{name} is {list(value.shape)}, but this model needs {list(target.shape)}; "
                "was the prompt made for another base?"
            )
        fitting.append((target, value))
    if left:
        raise ArtifactError(
            f"the saved prompt holds {', '.join(sorted(left))}, which this model has no place for; "
            "name the module in modules_to_save"
        )
    with torch.no_grad():
        for target, value in fitting:
            target.copy_(value)


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
    fingerprint = Fingerprint.of(model.base_model).to_dict()
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
        seq2seq=model.facts.is_encoder_decoder,
    )


def read(location: str | Path, subfolder: str | None, revision: str | None) -> Stored:
    """Read a folder or Hub repository and turn its configuration into ours.

    Raises:
        ArtifactError: If the files are missing or damaged.
        ConfigError: If the configuration is not one we know.
    """
    stored = load_adapter(location, subfolder=subfolder, revision=revision)
    values: dict[str, Any] = dict(stored.config)
    # Training further must not read the initial text again: the rows are loaded over it.
    values["inference_mode"] = True
    values["num_transformer_submodules"] = 1
    config = PromptTuningConfig.from_dict(values)
    if config.num_virtual_tokens is None:
        raise ArtifactError(
            f"{location}: adapter_config.json lacks num_virtual_tokens; save the prompt again"
        )
    return Stored(config, stored.tensors, stored.manifest, stored.location)


def check_base(stored: Stored | StoredAdapter, model: PreTrainedModel, ignore: bool) -> None:
    """Refuse a base that the prompt was not made for.

    Raises:
        FingerprintError: If the fingerprints differ and that is not ignored.
    """
    # A prompt from a format that records no weights of its base has an empty fingerprint.
    if stored.manifest is None or ignore or not stored.manifest.base_fingerprint:
        return
    made_for = Fingerprint.from_dict(stored.manifest.base_fingerprint)
    here = Fingerprint.of(model)
    if not made_for.matches(here):
        raise FingerprintError(
            f"the prompt in {stored.location} was made for {stored.manifest.base_model} "
            f"({made_for.model_type}, fingerprint {made_for.short}), this base is {model.name_or_path} "
            f"({here.model_type}, {here.short}); load its own base, or pass --ignore-fingerprint "
            "(ignore_fingerprint=True in Python)"
        )


def fill(model: PeftModel, adapter: str, stored: Stored, *, trainable: bool) -> None:
    """Give an attached prompt its saved values, frozen unless it is to be trained further."""
    load_state(model, adapter, stored.tensors)
    if stored.manifest is not None:
        # What was measured does not hold for rows that are about to change.
        fresh: dict[str, Any] = {"metrics": {}, "history": []} if trainable else {}
        model.manifests[adapter] = dataclasses.replace(stored.manifest, **fresh)
    if trainable:
        model.thaw(adapter)
