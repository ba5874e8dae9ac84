"""Starting a prompt from another one (Vu et al. 2022, SPoT): of any length, of this base or another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts import (
    RecordedBase,
    StoredPrompt,
    check_base,
    load_adapter,
    other_parts,
)
from softprompt.attach.encoders import build_prompt
from softprompt.backbone import (
    Fingerprint,
    input_embedding,
    is_encoder_decoder,
    load_base,
    load_tokenizer,
    shared_ids,
)
from softprompt.errors import BackboneError, ConfigError
from softprompt.prompts import (
    PROMPT_KEY,
    PromptLearningConfig,
    PromptModule,
    PromptTuningConfig,
    PromptTuningInit,
    Recycled,
    TaskType,
    recycle,
    resized,
)

logger = logging.getLogger(__name__)

_WORTHLESS = 0.9
"""Error from which a map is hardly better than zeros, whose error is 1."""


@dataclass(frozen=True, slots=True)
class Transferred:
    """First rows of a prompt, from another prompt.

    Attributes:
        rows: ``[S * P, H]`` in float32 on the CPU.
        note: What was done to the source, in one line.
        recycled: The fit that mapped it from another base; None when the base is its own.
    """

    rows: Tensor
    note: str
    recycled: Recycled | None = None


def started_prompt(
    config: PromptLearningConfig,
    model: PreTrainedModel,
    *,
    generator: torch.Generator | None = None,
) -> PromptModule:
    """Return the untrained module of a configuration, started from the prompt it names, if any.

    Args:
        config: What to build, its sizes filled in.
        model: The base it is for.
        generator: Source of randomness of the other initialisations.

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
        return build_prompt(config, table, generator=generator, model=model)
    found = transferred_rows(
        str(config.prompt_tuning_init_prompt),
        model,
        config.num_virtual_tokens or 0,
        model_types=config.output_model_types,
        tokenizer_name=config.tokenizer_name_or_path,
    )
    logger.log(logging.WARNING if found.recycled else logging.INFO, "%s", found.note)
    # In inference mode nothing is drawn, because values are about to be loaded.
    module = build_prompt(dataclasses.replace(config, inference_mode=True), table)
    module.load_stored({PROMPT_KEY: found.rows})
    return module


def transferred_rows(
    source: str | Path,
    model: PreTrainedModel,
    num_virtual_tokens: int,
    *,
    model_types: Sequence[str] | None = None,
    tokenizer_name: str | None = None,
) -> Transferred:
    """Return the rows of a stored prompt, made to fit another length and another base.

    A prompt of another base is mapped by least squares on the tokens that both bases share
    (``composition.recycle``). This is an approximation; the note holds its error.

    Args:
        source: Folder of the prompt, or its name on the Hub.
        model: The base the rows are for.
        num_virtual_tokens: Length wanted (P); longer repeats rows, shorter cuts them.
        model_types: ``output_model_types`` of the prompt, parts of the model that each get P rows.
        tokenizer_name: Tokenizer of ``model``, read only for another base; None takes the one
            beside the model.

    Raises:
        ArtifactError: The prompt cannot be read, or is not made of rows.
        ConfigError: It is for other parts of a model, does not say its base, or the bases share too
            few tokens.
        BackboneError: The base it was made for cannot be loaded, or is not the one on record.
    """
    stored = load_adapter(source)
    rows = torch.stack([part.float() for part in stored.prompt().tensors])
    named = model_types if is_encoder_decoder(model) else None
    reason = other_parts(stored.model_types(), sorted(named or ["ENCODER"], reverse=True))
    if reason is not None:
        raise ConfigError(
            f"the prompt cannot start from {source}: {reason}; start from a prompt with the same "
            "output_model_types"
        )
    note = f"the prompt starts from {source}"
    if rows.shape[1] != num_virtual_tokens:
        note += f", its {rows.shape[1]} rows made {num_virtual_tokens}"
    rows = resized(rows, num_virtual_tokens).flatten(0, 1)
    made_for = RecordedBase.of_stored(stored)
    reason = RecordedBase.of_model(model).differs(made_for)
    if reason is None:
        return Transferred(rows, note)
    if made_for.name is None:
        raise ConfigError(
            f"the prompt cannot start from {source}: {reason}; say which base it was made for with "
            "`softprompt convert --to softprompt --base-model` first"
        )
    fit = _recycled(stored, made_for.name, rows, model, tokenizer_name)
    if fit is None:
        return Transferred(rows, note)
    note += (
        f", mapped from {made_for.name} by {fit.tokens:,} shared tokens; this is approximate: "
        f"relative error {fit.error:.3f} on tokens left out of the fit"
    )
    if fit.error > _WORTHLESS:
        note += ", so the map says next to nothing: RANDOM or TEXT may well be a better start"
    return Transferred(fit.rows, note, fit)


@torch.no_grad()
def _recycled(
    stored: StoredPrompt,
    name: str,
    rows: Tensor,
    model: PreTrainedModel,
    tokenizer_name: str | None,
) -> Recycled | None:
    """Return rows of the base of this name mapped to another; None when both are one."""
    manifest = stored.manifest
    seq2seq = stored.config.get("task_type") == TaskType.SEQ_2_SEQ_LM
    # The whole base is loaded, not its table alone: its fingerprint tells whether it is the right one.
    try:
        own = load_base(name, seq2seq=seq2seq, torch_dtype=manifest.dtype if manifest else None)
    except BackboneError as cause:
        raise BackboneError(
            f"{stored.location} was made for {name}, which is needed to map it to this "
            f"base and cannot be loaded: {cause}"
        ) from cause
    check_base(stored, own.model)
    if Fingerprint.of(own.model).matches(Fingerprint.of(model)):
        return None
    words = load_tokenizer(tokenizer_name or str(model.name_or_path))
    there, here = input_embedding(own.model), input_embedding(model)
    sizes = there.weight.shape[0], here.weight.shape[0]
    from_ids, to_ids = shared_ids(own.tokenizer, words, sizes)
    return recycle(
        rows,
        there(torch.tensor(from_ids, dtype=torch.long)),
        here(torch.tensor(to_ids, dtype=torch.long, device=here.weight.device)),
    )
