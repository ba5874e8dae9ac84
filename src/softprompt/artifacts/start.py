"""The first values of a prompt, those that are read from files among them.

A multitask prompt may start from a trained one (Wang et al. 2023), any prompt from another (Vu et al. 2022,
SPoT): of any length, of this base or another.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts.files import load_safetensors, read_bytes
from softprompt.artifacts.peft_folder import load_adapter
from softprompt.artifacts.pickled import load_pickled
from softprompt.artifacts.stored_prompt import RecordedBase, StoredPrompt, check_base, other_parts, outside
from softprompt.backbone import Base, input_embedding, is_encoder_decoder, load_base, shared_ids, text_key_values
from softprompt.errors import ArtifactError, BackboneError, ConfigError
from softprompt.prompts import (
    PROMPT_KEY,
    SOURCE_INITS,
    MultitaskPromptTuningConfig,
    PromptLearningConfig,
    PromptModule,
    PromptTuningConfig,
    PromptTuningInit,
    Recycled,
    SourcePrompt,
    Start,
    TaskType,
    load_tokenizer,
    lookup,
    recycle,
    resized,
)

logger = logging.getLogger(__name__)

_WORTHLESS = 0.9
"""Error from which a map is hardly better than zeros, whose error is 1."""


@dataclass(frozen=True, slots=True)
class Transferred:
    """First values of a prompt, from another prompt.

    Attributes:
        embeddings: ``[S·P, H]`` in float32 on the CPU.
        note: What was done to the source, in one line.
        recycled: The fit that mapped it from another base; None when the base is its own.
    """

    embeddings: Tensor
    note: str
    recycled: Recycled | None = None


def started_prompt(
    config: PromptLearningConfig, model: PreTrainedModel, *, generator: torch.Generator | None = None
) -> PromptModule:
    """Return the untrained module of a configuration, with its first values.

    Args:
        config: What to build, its sizes filled in.
        model: The base it is for; it reads the text that a prefix or cartridge starts as.
        generator: Source of randomness; None is torch's global one, as in PEFT.

    Raises:
        ConfigError: If the configuration, or the prompt it names, cannot be used.
        ArtifactError: If that prompt cannot be read.
        BackboneError: If it is of another base, and that base cannot be loaded.
    """
    table = input_embedding(model)
    if (
        not isinstance(config, PromptTuningConfig)
        or config.inference_mode
        or config.prompt_tuning_init is not PromptTuningInit.PROMPT
    ):
        start = Start(generator, source_of(config), partial(text_key_values, model))
        return config.build(table, start)
    found = transferred_embeddings(
        str(config.prompt_tuning_init_prompt),
        model,
        config.num_virtual_tokens or 0,
        model_types=config.output_model_types,
        tokenizer_name=config.tokenizer_name_or_path,
    )
    logger.log(logging.WARNING if found.recycled else logging.INFO, "%s", found.note)
    # In inference mode nothing is drawn, because values are about to be loaded.
    module = dataclasses.replace(config, inference_mode=True).build(table, Start())
    module.config = config
    module.load_stored({PROMPT_KEY: found.embeddings})
    return module


def source_of(config: PromptLearningConfig) -> SourcePrompt | None:
    """Read the source prompt that a multitask configuration names; None where it starts without one.

    Raises:
        ConfigError: If the file is missing, damaged, holds code, or is no prompt.
    """
    if not isinstance(config, MultitaskPromptTuningConfig):
        return None
    if config.inference_mode or config.prompt_tuning_init not in SOURCE_INITS:
        return None
    path = Path(str(config.prompt_tuning_init_state_dict_path))
    if not path.is_file():
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path must be a weights file such as adapter_model.safetensors, "
            f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the file of the source prompt"
        )
    return SourcePrompt.of(_tensors(path), str(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        safe = path.suffix == ".safetensors"
        loaded: Any = load_safetensors(read_bytes(path), path) if safe else load_pickled(path)
    except ArtifactError as cause:
        raise ConfigError(
            f"the source prompt {path} cannot be read, it is damaged or holds more than tensors; "
            "save it again as .safetensors from a source you trust"
        ) from cause
    if isinstance(loaded, Tensor):
        # caikit's encoder.pt: the embeddings and nothing else.
        return {PROMPT_KEY: loaded.detach()}
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ConfigError(
            f"the source prompt {path} must hold a dict of named tensors; save it again with save_pretrained"
        )
    return {str(name): value.detach() for name, value in loaded.items()}


def transferred_embeddings(
    source: str | Path,
    model: PreTrainedModel,
    num_virtual_tokens: int,
    *,
    model_types: Sequence[str] | None = None,
    tokenizer_name: str | None = None,
) -> Transferred:
    """Return the embeddings of a stored prompt, made to fit another length and another base.

    A prompt of another base is mapped by least squares on the tokens that both bases share
    (``composition.recycle``). This is an approximation; the note holds its error.

    Args:
        source: Folder of the prompt, or its name on the Hub.
        model: The base they are for.
        num_virtual_tokens: Length wanted (P); longer repeats virtual tokens, shorter cuts them.
        model_types: ``output_model_types`` of the prompt, parts of the model that each get P virtual tokens.
        tokenizer_name: Tokenizer of ``model``, read only for another base; None takes the one beside the model.

    Raises:
        ArtifactError: The prompt cannot be read, or is not virtual tokens of the input.
        ConfigError: It is for other parts of a model, does not say its base, or the bases share too few tokens.
        BackboneError: The base it was made for cannot be loaded, or is not the one on record.
    """
    stored = load_adapter(source)
    embeddings = stored.virtual_tokens()
    named = model_types if is_encoder_decoder(model) else None
    reason = other_parts(stored.model_types(), sorted(named or ["ENCODER"], reverse=True))
    if reason is not None:
        raise ConfigError(
            f"the prompt cannot start from {source}: {reason}; start from a prompt with the same output_model_types"
        )
    note = f"the prompt starts from {source}"
    if embeddings.shape[1] != num_virtual_tokens:
        note += f", its {embeddings.shape[1]} virtual tokens made {num_virtual_tokens}"
    embeddings = resized(embeddings, num_virtual_tokens).flatten(0, 1)
    made_for = RecordedBase.of_stored(stored)
    reason = RecordedBase.of_model(model).differs(made_for)
    if reason is None:
        return Transferred(embeddings, note)
    if made_for.name is None:
        raise ConfigError(
            f"the prompt cannot start from {source}: {reason}; say which base it was made for with "
            "`softprompt convert --to softprompt --base-model` first"
        )
    fit = _recycled(stored, made_for.name, embeddings, model, tokenizer_name)
    if fit is None:
        return Transferred(embeddings, note)
    note += (
        f", mapped from {made_for.name} by {fit.tokens:,} shared tokens; this is approximate: "
        f"relative error {fit.error:.3f} on tokens left out of the fit"
    )
    if fit.error > _WORTHLESS:
        note += ", so the map says next to nothing: RANDOM or TEXT may well be a better start"
    return Transferred(fit.embeddings, note, fit)


@torch.no_grad()
def _recycled(
    stored: StoredPrompt, name: str, embeddings: Tensor, model: PreTrainedModel, tokenizer_name: str | None
) -> Recycled | None:
    """Return embeddings of the base of this name mapped to another; None when both are one."""
    manifest = stored.manifest
    seq2seq = stored.config.get("task_type") == TaskType.SEQ_2_SEQ_LM
    # The whole base is loaded, not its table alone: its fingerprint tells whether it is the right one.
    try:
        dtype = manifest.dtype if manifest else None
        own = load_base(outside(name, stored.location), seq2seq=seq2seq, torch_dtype=dtype, trust_remote_code=False)
    except BackboneError as cause:
        raise BackboneError(
            f"{stored.location} was made for {name}, which is needed to map it to this "
            f"base and cannot be loaded: {cause}"
        ) from cause
    check_base(stored, own.model, way_out=f"put the model that it was made for where {name} is")
    if own.fingerprint.matches(Base(model).fingerprint):
        return None
    words = load_tokenizer(tokenizer_name or str(model.name_or_path))
    there, here = input_embedding(own.model), input_embedding(model)
    sizes = there.weight.shape[0], here.weight.shape[0]
    from_ids, to_ids = shared_ids(own.tokenizer, words, sizes)
    return recycle(
        embeddings,
        lookup(there)(torch.tensor(from_ids, dtype=torch.long)),
        lookup(here)(torch.tensor(to_ids, dtype=torch.long)),
    )
