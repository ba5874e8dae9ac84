"""The checks on a prompt's folder: names, keys, shapes, values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softprompt.artifacts.peft_layouts import (
    OUR_KEYS,
    PEFT_KEYS,
    PROMPT_KEY,
    Shape,
    layout_of,
    prompt_rows,
)
from softprompt.errors import ArtifactError, nearest
from softprompt.prompts import CONFIG_NAME

__all__ = [
    "CARD_NAME",
    "MANIFEST_NAME",
    "OUR_KEYS",
    "PEFT_KEYS",
    "PICKLED_WEIGHTS_NAME",
    "PROMPT_KEY",
    "WEIGHTS_NAME",
    "check_config",
    "check_dtype",
    "check_tensors",
    "check_values",
    "config_json",
    "parse_object",
    "prompt_rows",
]

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
MANIFEST_NAME = "softprompt.json"
CARD_NAME = "README.md"
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
        ArtifactError: a method or a key PEFT does not know, or a value JSON cannot hold.
    """
    allowed = layout_of(config).keys
    for key in config:
        if key not in allowed:
            raise ArtifactError(
                f"{CONFIG_NAME} holds PEFT's keys only, came {key!r}{nearest(key, allowed)}: "
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
        ArtifactError: another method than those we know, or a size that is not a count.
    """
    layout_of(config).shapes(config)


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the stored tensors against the config: those of its method are there, and finite.

    Raises:
        ArtifactError: the first thing that is not so, with the sizes.
    """
    layout = layout_of(config)
    expected = layout.shapes(config)
    for name in expected:
        if name not in tensors:
            held = ", ".join(sorted(tensors)[:3]) or "no tensors"
            raise ArtifactError(
                f"expected a tensor {name!r} in {where}, it holds {held}: "
                f"check that the folder is a {config['peft_type']} adapter"
            )
    for name, tensor in tensors.items():
        check_values(name, tensor, where)
    width = tensors[PROMPT_KEY].shape[-1] if tensors[PROMPT_KEY].dim() else 0
    for name, shape in expected.items():
        tensor = tensors[name]
        check_dtype(name, tensor, where)
        if not _fits(tensor, shape, width):
            meaning = f" ({layout.meaning})" if name == PROMPT_KEY else ""
            raise ArtifactError(
                f"expected {name} [{', '.join('H' if s is None else str(s) for s in shape)}]"
                f"{meaning} in {where}, came {list(tensor.shape)}: "
                f"check that {CONFIG_NAME} belongs to these weights"
            )


def check_dtype(name: str, tensor: Tensor, where: str) -> None:
    """Check that a tensor has one of the floating types that prompts are stored in.

    Raises:
        ArtifactError: it has another.
    """
    if tensor.dtype not in _DTYPES:
        raise ArtifactError(
            f"expected {name} in {where} to be float32, float16, bfloat16 or float64, came "
            f"{str(tensor.dtype).removeprefix('torch.')}: convert it with .float() and save again"
        )


def _fits(tensor: Tensor, shape: Shape, width: int) -> bool:
    """Tell whether a tensor has its sizes; a width the config leaves open is the prompt's."""
    wanted = [width if size is None else size for size in shape]
    return list(tensor.shape) == wanted and tensor.numel() > 0


def check_values(name: str, tensor: Tensor, where: str) -> None:
    """Check that a tensor is dense and holds finite numbers.

    Raises:
        ArtifactError: it does not.
    """
    # Sparse tensors skip bounds checks when densified (CVE-2025-62164); none is legitimate here.
    plain = tensor.layout == torch.strided and not tensor.is_nested
    if not plain or tensor.is_quantized or tensor.is_meta:
        raise ArtifactError(
            f"expected plain dense tensors in {where}, {name} is not: save it as .to_dense()"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        broken = int((~torch.isfinite(tensor.float())).sum())
        raise ArtifactError(
            f"expected finite numbers in {name} of {where}, {broken} of {tensor.numel()} are NaN "
            "or infinite: use an earlier checkpoint, or train again at a lower learning rate"
        )
