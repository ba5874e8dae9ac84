"""Rows that come without a PEFT folder around them, checked and given one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.artifacts.layout import PROMPT_KEY, check_dtype, check_tensors, check_values
from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import StoredAdapter
from softprompt.backbone import Fingerprint, LoadedBase, facts_of
from softprompt.errors import ArtifactError
from softprompt.prompts import KEY_VALUE_METHODS, PromptTuningConfig, TaskType

ENCODER, DECODER = "ENCODER", "DECODER"

_KINDS = {TaskType.CAUSAL_LM: False, TaskType.SEQ_2_SEQ_LM: True}

_MAX_TOKENS = (256, 128)
"""Input and answer lengths where a format does not record them."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a format records about its rows besides the rows.

    Attributes:
        base_model: Name of the base.
        seq2seq: Whether the base has an encoder and a decoder.
        template: The verbalizer.
        dtype: dtype of the base in training.
        settings: What else is known, for ``softprompt.json``.
    """

    base_model: str
    seq2seq: bool
    template: str = "{{input}}"
    dtype: str = "float32"
    settings: Mapping[str, Any] | None = None

    @classmethod
    def of_base(cls, base: LoadedBase) -> Origin:
        """Return what a base tells about rows made for it."""
        facts = facts_of(base.model)
        dtype = str(base.model.dtype).removeprefix("torch.")
        return cls(base.name, facts.is_encoder_decoder, dtype=dtype)


def check_rows(rows: Any, where: str) -> Tensor:
    """Return bare rows ``[P, H]`` on the CPU when they are ones.

    Raises:
        ArtifactError: no tensor, sparse, not 2-D, empty, not finite, or not floating.
    """
    if not isinstance(rows, Tensor):
        raise ArtifactError(
            f"expected one tensor [P, H] in {where}, came a {type(rows).__name__}: "
            "save the rows alone"
        )
    check_values("the tensor", rows, where)
    check_dtype("the tensor", rows, where)
    if rows.dim() != 2 or not rows.numel():
        raise ArtifactError(
            f"expected one tensor [P, H] (virtual tokens, width) in {where}, came "
            f"{list(rows.shape)}: save the rows alone"
        )
    return rows.detach().cpu()


def bare_adapter(
    parts: Mapping[str, Tensor], origin: Origin, base: LoadedBase | None, where: str
) -> StoredAdapter:
    """Return bare rows as a prompt with the configuration PEFT's folder needs.

    Args:
        parts: checked rows ``[P, H]`` for ENCODER, DECODER or both; a causal model's are DECODER.
        origin: what is recorded about them.
        base: gives the fingerprint and the width; without it neither is checked.
        where: the file or folder, for messages.

    Raises:
        ArtifactError: the parts do not fit the kind of base, each other, or the base's width.
    """
    wanted = (ENCODER, DECODER) if origin.seq2seq else (DECODER,)
    if not parts or not set(parts) <= set(wanted):
        raise ArtifactError(
            f"expected rows for {' or '.join(wanted)} in {where}, as {origin.base_model} is a "
            f"{'seq2seq' if origin.seq2seq else 'causal'} model, came {', '.join(parts) or 'none'}: "
            "check the base model"
        )
    ordered = [parts[name] for name in wanted if name in parts]
    shapes = {tuple(rows.shape) for rows in ordered}
    if len(shapes) > 1:
        raise ArtifactError(
            f"expected an encoder's and a decoder's rows of one shape in {where}, came "
            f"{' and '.join(str(list(rows.shape)) for rows in ordered)}: convert them one by one"
        )
    length, width = ordered[0].shape
    if base is not None:
        check_width(width, base, where)
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if origin.seq2seq else TaskType.CAUSAL_LM,
        num_virtual_tokens=length,
        token_dim=width,
        num_transformer_submodules=len(ordered),
        output_model_types=[name for name in wanted if name in parts] if origin.seq2seq else None,
        base_model_name_or_path=origin.base_model,
        inference_mode=True,
    ).to_dict()
    # PEFT reads a seq2seq prompt's sizes from its config, and a base's cannot be asked for.
    if base is not None:
        facts = facts_of(base.model)
        config |= {"num_layers": facts.num_layers, "num_attention_heads": facts.num_attention_heads}
    tensors = {PROMPT_KEY: torch.cat(ordered)}
    check_tensors(config, tensors, where)
    return StoredAdapter(config, tensors, manifest_of(origin, base), where)


def check_width(width: int, base: LoadedBase, where: str) -> None:
    """Refuse rows of another width than the base's embeddings.

    Raises:
        ArtifactError: the widths differ.
    """
    own = facts_of(base.model).token_dim
    if width != own:
        raise ArtifactError(
            f"expected rows {own} wide in {where}, as the embeddings of {base.name}, came {width}: "
            "name the base that the prompt was made for"
        )


def check_fit(stored: StoredAdapter, base: LoadedBase) -> None:
    """Refuse a base of another kind or width than a prompt's, whatever its weights are.

    Raises:
        ArtifactError: the prompt cannot stand before this base.
    """
    task, seq2seq = stored.config.get("task_type"), facts_of(base.model).is_encoder_decoder
    if task in _KINDS and _KINDS[task] != seq2seq:
        raise ArtifactError(
            f"the prompt in {stored.location} is for {task}, {base.name} is a "
            f"{'seq2seq' if seq2seq else 'causal'} model; name the base that it was made for"
        )
    if stored.config["peft_type"] not in KEY_VALUE_METHODS:
        check_width(stored.prompt.shape[1], base, stored.location)


def manifest_of(origin: Origin, base: LoadedBase | None) -> Manifest:
    """Return the record of rows that came without one: free text, and lengths that are ours."""
    return Manifest(
        template=origin.template,
        task="generation",
        labels=None,
        base_model=origin.base_model,
        base_fingerprint={} if base is None else Fingerprint.of(base.model).to_dict(),
        max_source_length=_MAX_TOKENS[0],
        max_target_length=_MAX_TOKENS[1],
        dtype=origin.dtype,
        seq2seq=origin.seq2seq,
        settings=dict(origin.settings or {}),
    )
