"""Saves attached prompts to PEFT's folders, and loads them into attached prompts."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts import Manifest, Origin, StoredPrompt, check_base, save_adapter, tensors_read, upload
from softprompt.artifacts import load_adapter as read_adapter
from softprompt.artifacts import manifest_of as made_manifest
from softprompt.backbone import HEAD, head_tensors
from softprompt.errors import ArtifactError, ConfigError
from softprompt.peft.adapters import LoadResult, heads_of
from softprompt.prompts import (
    HUB_OPTIONS,
    Parameterization,
    PeftConfig,
    PromptLearningConfig,
    TaskType,
    check_fit,
    take_over,
)

if TYPE_CHECKING:
    from softprompt.peft.model import PeftModel

logger = logging.getLogger(__name__)

_OWN = ("subfolder", "key_mapping", "ignore_fingerprint", "ignore_mismatched_sizes")
_NEUTRAL = frozenset({"autocast_adapter_dtype", "low_cpu_mem_usage", "use_safetensors", "repo_type"})
"""Options of loading that change nothing: a prompt is float32 and small, and safetensors come first."""
_UPLOAD = ("commit_message", "private", "token", "revision", "create_pr")


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return copies of what a saved prompt holds: ``prompt_embeddings`` ``[P·S, H]``, baked, and its heads.

    Args:
        model: The prompted model.
        state_dict: Values to take instead of the model's, under the names of ``model.state_dict()``, such as
            those gathered from several processes; what it does not name is the model's.
        adapter_name: The prompt.
        unwrap_compiled: Whether ``model`` may be the result of ``torch.compile``.
        save_embedding_layers: True also returns the base's embedding tables; "auto" and False do not, as a
            prompt leaves them as they are.

    Raises:
        AdapterError: If there is no such prompt.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    encoder, heads = model.encoder_of(adapter_name), _heads(model, adapter_name)
    if state_dict is not None:
        own = f"prompt_encoder.{adapter_name}."
        given = {name.removeprefix(own): value for name, value in state_dict.items() if name.startswith(own)}
        encoder = copy.deepcopy(encoder)
        encoder.load_state_dict(given, strict=False)
        for path, head in heads_of(model.base_model, adapter_name):
            inside = f"{HEAD}{path}.modules_to_save.{adapter_name}."
            heads |= {f"{HEAD}{path}.{n}": state_dict.get(inside + n, v) for n, v in head.state_dict().items()}
    if save_embedding_layers is True:
        heads |= _embeddings(model.base_model)
    return encoder.stored() | {name: value.detach().cpu().clone() for name, value in heads.items()}


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy what ``get_peft_model_state_dict`` returned into an attached prompt, all of it or nothing.

    With ``ignore_mismatched_sizes`` values of another shape leave the prompt as it is, with a warning.
    ``low_cpu_mem_usage`` changes nothing: a prompt is small.

    Returns:
        The names that were missing and those left over, none of either.

    Raises:
        ArtifactError: If a value is missing, left over, or of another shape.
    """
    encoder, heads = model.encoder_of(adapter_name), _heads(model, adapter_name)
    state = _without_embeddings(model.base_model, peft_model_state_dict, heads)
    own = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    given = {name: value for name, value in state.items() if name.startswith(HEAD)}
    left = sorted(given.keys() - heads.keys())
    if left:
        raise ArtifactError(
            f"the saved prompt holds {', '.join(left)}, which this model has no place for; "
            "name the module in modules_to_save"
        )
    own = dict(tensors_read(own, model.peft_config[adapter_name], seq2seq=model.base.is_encoder_decoder))
    if ignore_mismatched_sizes:
        current = get_peft_model_state_dict(model, adapter_name=adapter_name)
        for values in (own, given):
            for name in [n for n in values if n in current and values[n].shape != current[n].shape]:
                found, wanted = list(values[name].shape), list(current[name].shape)
                warnings.warn(f"{name} is {found}, the model needs {wanted}; it keeps its own value", stacklevel=2)
                values[name] = current[name]
    check_fit(heads, given)
    encoder.load_stored(own)
    take_over(heads, given)
    return LoadResult([], [])


def load_peft_weights(
    model_id: str | Path,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Return the tensors of a saved prompt, on ``device`` (None is the CPU); see ``PeftModel.from_pretrained``."""
    loading = Loading.of({"key_mapping": key_mapping, **hub})
    return {name: value.to(device or "cpu") for name, value in loading.read(model_id).tensors.items()}


def _heads(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the values of an adapter's heads under PEFT's names, sharing their memory."""
    return head_tensors(dict(heads_of(model.base_model, adapter)))


_CHECKPOINT = "checkpoint-"
"""How the folders begin that transformers' Trainer saves a running training to."""

PARAMETERS_NAME = "training_parameters.safetensors"
"""File of a checkpoint with the parameters behind a prompt whose saved value does not tell them."""


def _embeddings(base: PreTrainedModel) -> dict[str, Tensor]:
    """Return the base's input and output embeddings under PEFT's names, sharing their memory."""
    layers = {
        id(layer)
        for layer in (base.get_input_embeddings(), cast(Any, base).get_output_embeddings())
        if layer is not None
    }
    return head_tensors({path: module for path, module in base.named_modules() if id(module) in layers})


def _without_embeddings(
    base: PreTrainedModel, state: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return saved values without those of the base's embeddings, which must be the base's own.

    Raises:
        ArtifactError: If they are not: a prompt never changes its base.
    """
    own = {name: value for name, value in _embeddings(base).items() if name in state and name not in heads}
    for name, value in own.items():
        if state[name].shape != value.shape or not torch.equal(state[name].to(value), value):
            raise ArtifactError(
                f"the saved prompt holds {name}, and this base's differs; resize and load the base's own "
                "embeddings first, a prompt does not change its base"
            )
    return {name: value for name, value in state.items() if name not in own}


def save(
    model: PeftModel,
    adapter: str,
    directory: Path,
    *,
    pickled: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    embeddings: bool | str = "auto",
) -> None:
    """Write one prompt; see ``PeftModel.save_pretrained``.

    A checkpoint of transformers' Trainer also gets the parameters of a reparameterised prompt, to resume from.
    """
    target = directory if adapter == "default" else directory / adapter
    config = dataclasses.replace(model.peft_config[adapter], inference_mode=True)
    save_adapter(
        target,
        config.to_dict(),
        get_peft_model_state_dict(model, state_dict, adapter, save_embedding_layers=embeddings),
        manifest_of(model, adapter),
        overwrite=True,
        pickled=pickled,
    )
    parameters = model.encoder_of(adapter).state_dict()
    if directory.name.startswith(_CHECKPOINT) and not _told_by_value(model, adapter):
        save_file({name: value.cpu().contiguous() for name, value in parameters.items()}, target / PARAMETERS_NAME)


def _told_by_value(model: PeftModel, adapter: str) -> bool:
    """Tell whether a prompt's saved value tells all parameters behind it."""
    encoder = model.encoder_of(adapter)
    sizes = [parameter.numel() for parameter in encoder.parameters()]
    return len(sizes) == 1 or sum(sizes) == sum(value.numel() for value in encoder.stored().values())


def refill(model: PeftModel, adapter: str, stored: StoredPrompt, directory: Path) -> LoadResult:
    """Copy a checkpoint's values into an attached prompt's own parameters, which an optimiser may hold.

    Raises:
        ArtifactError: If they do not fit, or do not tell the parameters and the file of those is missing.
    """
    parameters = directory / PARAMETERS_NAME
    encoder = model.encoder_of(adapter)
    if not parameters.is_file():
        raise ArtifactError(
            f"{directory} holds the baked value of {adapter!r}, which does not tell the parameters of a "
            f"reparameterised prompt; expected {PARAMETERS_NAME} beside it, as in a checkpoint of Trainer"
        )
    take_over(dict(encoder.named_parameters()), load_file(parameters))
    take_over(_heads(model, adapter), {n: value for n, value in stored.tensors.items() if n.startswith(HEAD)})
    return LoadResult([], [])


def push(model: PeftModel, repo_id: str, **options: Any) -> str:
    """Save all prompts into a Hub repository; see ``PeftModel.push_to_hub``."""
    hub = {name: options.pop(name) for name in _UPLOAD if name in options}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        return upload(Path(folder), repo_id, **hub)


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
        own = {name: given.pop(name) for name in _OWN if name in given}
        others = sorted(given.keys() - _NEUTRAL)
        if others:
            warnings.warn(f"{', '.join(others)}: not used for a prompt, as in PEFT; leave it out", stacklevel=3)
        return cls(hub, device=device, dispatch=dispatch, **own)

    def read(self, model_id: str | Path) -> StoredPrompt:
        """Return a saved prompt, its names replaced as ``key_mapping`` says; see ``load_adapter``."""
        stored = read_adapter(model_id, subfolder=self.subfolder, **self.hub)
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
    elif not _told_by_value(model, adapter):
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
