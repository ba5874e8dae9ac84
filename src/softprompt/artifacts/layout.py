"""The layout of PEFT's prompt-tuning folder as checks: names, keys, shapes, values.

The keys are those of PEFT 0.21's ``PromptTuningConfig``; PEFT warns about any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softprompt.errors import ArtifactError, nearest
from softprompt.prompts.configs import CONFIG_NAME, PeftType

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
MANIFEST_NAME = "softprompt.json"
CARD_NAME = "README.md"
PROMPT_KEY = "prompt_embeddings"

PEFT_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "modules_to_save",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "peft_type",
        "peft_version",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "revision",
        "task_type",
        "token_dim",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
OUR_KEYS = frozenset({"prompt_sees_input", "output_model_types", "placement"})
"""Options that PEFT does not have; a config that holds one has a ``peft_type`` that PEFT refuses."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def parse_object(text: str, name: str) -> dict[str, Any]:
    """Read one JSON object from the text of the file ``name``.

    Raises:
        ArtifactError: not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"expected JSON in {name}, it cannot be read ({error}): restore it from the original"
        ) from error
    if not isinstance(value, dict):
        raise ArtifactError(
            f"expected a JSON object in {name}, came a {type(value).__name__}: "
            "restore it from the original"
        )
    return value


def config_json(config: Mapping[str, Any]) -> str:
    """Return the text of ``adapter_config.json``, keys sorted, as PEFT writes it.

    Raises:
        ArtifactError: a key PEFT does not know, or a value JSON cannot hold.
    """
    allowed = PEFT_KEYS
    if config.get("peft_type") == PeftType.EXTENDED_PROMPT_TUNING:
        allowed |= OUR_KEYS
    for key in config:
        if key not in allowed:
            raise ArtifactError(
                f"{CONFIG_NAME} holds PEFT's keys only, came {key!r}{nearest(key, PEFT_KEYS)}: "
                "put settings of our own into softprompt.json"
            )
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"expected plain JSON values in {CONFIG_NAME} ({error}): pass config.to_dict()"
        ) from error


def check_config(config: Mapping[str, Any]) -> None:
    """Check what the weights are read with: the method and the sizes.

    Raises:
        ArtifactError: another method than prompt tuning, or a size that is not a count.
    """
    kind = config.get("peft_type")
    if kind not in list(PeftType):
        raise ArtifactError(
            f"expected peft_type {' or '.join(PeftType)} in {CONFIG_NAME}, came "
            f"{kind!r}: load other adapters with peft"
        )
    _count(config, "num_virtual_tokens", required=True)
    _count(config, "num_transformer_submodules")
    _count(config, "token_dim")


def prompt_rows(config: Mapping[str, Any]) -> int:
    """Return P * S: virtual tokens times the transformer submodules that each get their own."""
    submodules = _count(config, "num_transformer_submodules")
    if submodules is None:
        submodules = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    return (_count(config, "num_virtual_tokens", required=True) or 0) * submodules


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the stored tensors against the config: ``prompt_embeddings`` is finite ``[P*S, H]``.

    Raises:
        ArtifactError: the first thing that is not so, with the sizes.
    """
    if PROMPT_KEY not in tensors:
        held = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise ArtifactError(
            f"expected a tensor {PROMPT_KEY!r} in {where}, it holds {held}: "
            "check that the folder is a prompt-tuning adapter"
        )
    for name, tensor in tensors.items():
        _check_values(name, tensor, where)
    prompt, rows, width = tensors[PROMPT_KEY], prompt_rows(config), _count(config, "token_dim")
    shape = list(prompt.shape)
    if prompt.dtype not in _DTYPES:
        raise ArtifactError(
            f"expected {PROMPT_KEY} in {where} to be float32, float16, bfloat16 or float64, came "
            f"{str(prompt.dtype).removeprefix('torch.')}: convert it with .float() and save again"
        )
    if prompt.dim() != 2 or shape[0] != rows or shape[1] != (width or shape[1]) or shape[1] == 0:
        raise ArtifactError(
            f"expected {PROMPT_KEY} [{rows}, {width or 'H'}] (num_virtual_tokens * "
            f"num_transformer_submodules, token_dim) in {where}, came {shape}: "
            f"check that {CONFIG_NAME} belongs to these weights"
        )


def _check_values(name: str, tensor: Tensor, where: str) -> None:
    # Sparse tensors skip bounds checks when densified (CVE-2025-62164); none is legitimate here.
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ArtifactError(
            f"expected plain dense tensors in {where}, {name} is not: save it as .to_dense()"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        broken = int((~torch.isfinite(tensor.float())).sum())
        raise ArtifactError(
            f"expected finite numbers in {name} of {where}, {broken} of {tensor.numel()} are NaN "
            "or infinite: use an earlier checkpoint, or train again at a lower learning rate"
        )


def _count(config: Mapping[str, Any], key: str, *, required: bool = False) -> int | None:
    value = config.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtifactError(
            f"expected {key} in {CONFIG_NAME} to be a whole number above 0, came {value!r}: "
            "restore it from the original"
        )
    return value
