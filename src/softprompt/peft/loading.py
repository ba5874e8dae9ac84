"""Attaches saved prompts, with PEFT's many options of loading."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts import StoredPrompt, check_base
from softprompt.artifacts import load_adapter as read_adapter
from softprompt.backbone import HEAD
from softprompt.errors import ConfigError
from softprompt.peft.plain_modules import as_pretrained
from softprompt.peft.saving import refill, set_peft_model_state_dict, told_by_value
from softprompt.prompts import HUB_OPTIONS, Parameterization, PeftConfig, PromptLearningConfig, TaskType

if TYPE_CHECKING:
    from softprompt.peft.adapters import LoadResult
    from softprompt.peft.model import PeftModel

logger = logging.getLogger(__name__)

_OWN = ("subfolder", "key_mapping", "ignore_fingerprint", "ignore_mismatched_sizes")
_NEUTRAL = frozenset({"autocast_adapter_dtype", "low_cpu_mem_usage", "use_safetensors", "repo_type"})
"""Options of loading that change nothing: a prompt is float32 and small, and safetensors come first."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What PEFT's options of loading mean for a prompt.

    Attributes:
        hub: Options of the download, ``revision``, ``token`` and ``cache_dir`` among them.
        subfolder: Folder of a named prompt inside the repository or folder.
        key_mapping: Replacements by the pattern of the names of trained modules that they apply to.
        device: Where the prompt goes; None is where the base is.
        dispatch: ``device_map``, ``max_memory`` and ``offload_folder`` for the base, as accelerate takes
            them; empty where the base stays where it is.
        ignore_fingerprint: Whether to attach to another base than the one the prompt was made for.
        ignore_mismatched_sizes: See ``set_peft_model_state_dict``.
    """

    hub: Mapping[str, Any]
    subfolder: str | None = None
    key_mapping: Mapping[str, str] | None = None
    device: str | int | torch.device | None = None
    dispatch: Mapping[str, Any] = field(default_factory=dict)
    ignore_fingerprint: bool = False
    ignore_mismatched_sizes: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Return what options mean; those that concern no prompt are named in a warning, as PEFT takes any.

        Raises:
            ConfigError: If two of them contradict each other.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if token := given.pop("use_auth_token", None):
            given.setdefault("token", token)
        hub = {name: given.pop(name) for name in HUB_OPTIONS if name in given}
        if given.pop("ephemeral_gpu_offload", False):
            warnings.warn("Ephemeral GPU offloading is not supported for this model. Ignoring.", stacklevel=3)
        folder, also = given.pop("offload_dir", None), given.pop("offload_folder", None)
        if folder is not None and also is not None:
            raise ConfigError("Cannot use `offload_folder` when `offload_dir` is specified.")
        device_map, memory = given.pop("device_map", None), given.pop("max_memory", None)
        device = given.pop("torch_device", None)
        if device is None and device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
            mapped = isinstance(device_map, Mapping)
            device = device_map.get("prompt_encoder", device_map.get("")) if mapped else device_map
        folder = folder if folder is not None else also
        moves = memory is not None or folder is not None
        dispatch = (
            {"device_map": device_map or "auto", "max_memory": memory, "offload_dir": folder} if moves else {}
        )
        own = {name: value for name in _OWN if (value := given.pop(name, None)) not in (None, "")}
        others = sorted(given.keys() - _NEUTRAL)
        if others:
            warnings.warn(f"{', '.join(others)}: not used for a prompt, as in PEFT; leave it out", stacklevel=3)
        return cls(hub, device=device, dispatch=dispatch, **own)

    def read(self, model_id: str | Path) -> StoredPrompt:
        """Return a saved prompt, its names replaced as ``key_mapping`` says; see ``load_adapter``."""
        hub = dict(self.hub)
        if Path(model_id).exists():
            hub.pop("revision", None)  # a folder has one; PEFT's users name the Hub's for both
        stored = read_adapter(model_id, subfolder=self.subfolder, **hub)
        if not self.key_mapping:
            return stored
        tensors = {_mapped(name, self.key_mapping): value for name, value in stored.tensors.items()}
        return dataclasses.replace(stored, tensors=tensors)

    def place(self, model: PreTrainedModel) -> None:
        """Spread a base that is not spread yet over devices, memory and disk, as accelerate does."""
        if not self.dispatch or hasattr(model, "hf_device_map"):
            return
        from accelerate import dispatch_model, infer_auto_device_map  # type: ignore[import-untyped]

        device_map, memory, folder = (self.dispatch[n] for n in ("device_map", "max_memory", "offload_dir"))
        if isinstance(device_map, str):
            whole = getattr(model, "_no_split_modules", None)
            names = list(whole) if whole is not None else None
            device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=names)
        # accelerate reads the folder wherever one is named, whether something was put there or not.
        folder = folder if "disk" in device_map.values() else None
        dispatch_model(model, device_map=device_map, offload_dir=folder)


def _mapped(name: str, key_mapping: Mapping[str, str]) -> str:
    """Return a tensor's name with the first pattern replaced that is found in the path of its module."""
    if not name.startswith(HEAD):
        return name
    path = name.removeprefix(HEAD)
    for pattern, replacement in key_mapping.items():
        found, count = re.subn(pattern, replacement, path)
        if count:
            return HEAD + found
    return name


def attached(
    owner: type[PeftModel],
    model: PreTrainedModel,
    model_id: str | Path,
    adapter: str,
    *,
    trainable: bool,
    config: PeftConfig | None,
    loading: Loading,
) -> PeftModel:
    """Attach a saved prompt to its base; see ``PeftModel.from_pretrained``."""
    if config is not None and not isinstance(config, PeftConfig):
        raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}")
    stored = loading.read(model_id)
    given = config
    config = stored.configuration() if given is None else dataclasses.replace(given, inference_mode=True)
    target = owner.classes.get(cast(TaskType, config.task_type), owner)
    if owner.task is not None and target is not owner:
        raise ConfigError(
            f"{model_id} holds a prompt for task_type {config.task_type}, load it with {target.__name__}"
        )
    model = as_pretrained(model, config)
    check_base(stored, model, ignore=loading.ignore_fingerprint)
    loading.place(model)
    made = target(model, config, adapter)
    try:
        _fill(made, adapter, stored, loading, trainable=trainable)
    except Exception:
        made.detach()
        raise
    if given is not None:
        # PEFT goes on with the caller's own object.
        vars(given).update(vars(made.peft_config[adapter]))
        made.peft_config[adapter] = made.encoder_of(adapter).config = cast(PromptLearningConfig, given)
    return made


def attach_another(
    model: PeftModel, model_id: str | Path, adapter: str, *, trainable: bool, loading: Loading
) -> LoadResult:
    """Attach one more saved prompt, or load its values into one that is there; see ``PeftModel.load_adapter``."""
    stored = loading.read(model_id)
    check_base(stored, model.base_model, ignore=loading.ignore_fingerprint)
    new = adapter not in model.peft_config
    if new:
        model.add_adapter(adapter, stored.configuration())
    elif not told_by_value(model, adapter):
        # Trainer resumes and restores the best epoch in this way: an optimiser holds the parameters.
        return refill(model, adapter, stored, Path(model_id))
    try:
        return _fill(model, adapter, stored, loading, trainable=trainable)
    except Exception:
        if new:
            model.delete_adapter(adapter)
        raise


def _fill(model: PeftModel, adapter: str, stored: StoredPrompt, loading: Loading, *, trainable: bool) -> LoadResult:
    """Give an attached prompt its saved values, frozen unless it is to be trained further."""
    loaded = set_peft_model_state_dict(model, stored.tensors, adapter, loading.ignore_mismatched_sizes)
    if loading.device is not None:
        model.encoder_of(adapter).to(loading.device)
    if stored.manifest is not None:
        # What was measured does not hold for values that are about to change.
        fresh: dict[str, Any] = {"metrics": {}, "history": []} if trainable else {}
        model.manifests[adapter] = dataclasses.replace(stored.manifest, **fresh)
    if trainable:
        _log_what_is_trained(stored)
        model.thaw(adapter)
    return loaded


def _log_what_is_trained(stored: StoredPrompt) -> None:
    """Log that the file of a parameterised prompt holds virtual tokens, as far as it is on record."""
    settings = stored.manifest.settings if stored.manifest is not None else {}
    kind = (settings.get("tuning_config") or {}).get("parameterization", Parameterization.DIRECT)
    if kind != Parameterization.DIRECT:
        logger.info(
            "the virtual tokens of a %s prompt are baked: training goes on with the tokens themselves", kind
        )


def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a saved prompt, on ``device`` (None is the CPU); see ``PeftModel.from_pretrained``."""
    loading = Loading.of({"key_mapping": key_mapping, **hub})
    return {name: value.to(device or "cpu") for name, value in loading.read(model_id).tensors.items()}
