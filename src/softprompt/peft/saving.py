"""Saves attached prompts to PEFT's folders, and takes over what was saved."""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts import (
    Manifest,
    Origin,
    StoredPrompt,
    model_card,
    save_adapter,
    tensors_read,
    upload,
    write_atomically,
)
from softprompt.artifacts import manifest_of as made_manifest
from softprompt.backbone import HEAD, head_tensors
from softprompt.errors import ArtifactError, line
from softprompt.peft.adapters import LoadResult, heads_of
from softprompt.prompts import TaskType, check_fit, take_over

if TYPE_CHECKING:
    from softprompt.peft.model import PeftModel

logger = logging.getLogger(__name__)

_UPLOAD = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")


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
                said = f"{line(name)} is {found}, the model needs {wanted}; it keeps its own value"
                warnings.warn(said, stacklevel=2)
                values[name] = current[name]
    check_fit(heads, given)
    encoder.load_stored(own)
    take_over(heads, given)
    return LoadResult([], [])


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
    if target != directory and target.is_symlink():
        raise ArtifactError(f"{target} is a link; remove it, or save {adapter!r} into another folder")
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
    if directory.name.startswith(_CHECKPOINT) and not told_by_value(model, adapter):
        values = {name: value.cpu().contiguous() for name, value in parameters.items()}
        write_atomically(target / PARAMETERS_NAME, bytes_from_tensors(values))


def told_by_value(model: PeftModel, adapter: str) -> bool:
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
    tags = options.pop("tags", None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        for path in Path(folder).rglob("README.md") if tags else ():
            card = ModelCard.load(path)
            card.data.tags = [*(card.data.tags or ()), *tags]
            write_atomically(path, str(card))
        return upload(Path(folder), repo_id, **hub)


def write_card(model: PeftModel, directory: Path) -> None:
    """Write a model card for the active prompt, or name library and base in the one that is there."""
    path, config = directory / "README.md", model.active_peft_config
    if path.is_file():
        card = ModelCard.load(path, ignore_metadata_errors=True)
        base = config.base_model_name_or_path or ""
        known = {"library_name": "peft"} | ({"base_model": base} if base and not Path(base).exists() else {})
        for name, value in known.items():
            setattr(card.data, name, value)
        write_atomically(path, str(card))  # a link is replaced, not written behind
    else:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model_card(config.to_dict(), manifest_of(model, model.active_adapter)))


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
