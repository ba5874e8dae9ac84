"""What PEFT's folder holds, by method: the keys of its configuration, its tensors, and their checks; and its paths.

The keys are the fields of the configurations, which are PEFT 0.21's besides those marked ``ours``; PEFT
warns about any other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.errors import ArtifactError, excerpt, nearest
from softprompt.prompts import COLS_KEY, CONFIG_NAME, PROMPT_KEY, ROWS_KEY, PeftType, config_class
from softprompt.untrusted import MOST_SIZE, MOST_VIRTUAL_TOKENS, check_types

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
MANIFEST_NAME = "softprompt.json"
CARD_NAME = "README.md"
CURVE_NAME = "training_curve.png"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Shape = tuple[int | None, ...]
"""Sizes a tensor must have; None accepts any."""

OUR_KEYS = frozenset({"prompt_sees_input", "output_model_types", "placement"})
"""Options that PEFT does not have; a config that holds one has a ``peft_type`` that PEFT refuses."""


@dataclass(frozen=True, slots=True)
class PeftLayout:
    """What the folder of one method holds.

    Attributes:
        keys: What ``adapter_config.json`` may hold.
        shapes: The tensors that a config needs, by name.
        meaning: How the sizes of ``prompt_embeddings`` are made, for messages.
    """

    keys: frozenset[str]
    shapes: Callable[[Mapping[str, Any]], dict[str, Shape]]
    meaning: str = "num_virtual_tokens * num_transformer_submodules, token_dim"


def layout_of(config: Mapping[str, Any]) -> PeftLayout:
    """Return the layout of a configuration's method; raises ArtifactError if the method is not supported."""
    kind = config.get("peft_type")
    if kind not in list(PeftType):
        raise ArtifactError(
            f"expected peft_type {' or '.join(PeftType)} in {CONFIG_NAME}, got "
            f"{kind!r}: load other adapters with peft"
        )
    return LAYOUTS[PeftType(str(kind))]


def stored_tokens(config: Mapping[str, Any]) -> int:
    """Return P * S: virtual tokens of a prompt, once for each transformer submodule."""
    submodules = count_in(config, "num_transformer_submodules")
    if submodules is None:
        submodules = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    return (count_in(config, "num_virtual_tokens", required=True) or 0) * submodules


def count_in(config: Mapping[str, Any], key: str, *, required: bool = False) -> int | None:
    """Return a size of a config, None when not set; raises ArtifactError if it is no count, or required."""
    value = config.get(key)
    if value is None and not required:
        return None
    most = MOST_VIRTUAL_TOKENS if key == "num_virtual_tokens" else MOST_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ArtifactError(
            f"expected {key} in {CONFIG_NAME} to be a whole number above 0, of at most {most:,}, got "
            f"{excerpt(repr(value))}: restore it from the original"
        )
    return value


def _virtual_tokens(config: Mapping[str, Any]) -> dict[str, Shape]:
    return {PROMPT_KEY: (stored_tokens(config), count_in(config, "token_dim"))}


def _factors(config: Mapping[str, Any]) -> dict[str, Shape]:
    tasks, rank = (count_in(config, key) or 1 for key in ("num_tasks", "num_ranks"))
    tokens, width = stored_tokens(config), count_in(config, "token_dim")
    return {PROMPT_KEY: (tokens, width), COLS_KEY: (tasks, tokens, rank), ROWS_KEY: (tasks, rank, width)}


def _keys_and_values(config: Mapping[str, Any]) -> dict[str, Shape]:
    # P whatever S is: PEFT gives both parts of a seq2seq model the same keys and values.
    layers, width = count_in(config, "num_layers"), count_in(config, "token_dim")
    columns = None if layers is None or width is None else layers * 2 * width
    return {PROMPT_KEY: (count_in(config, "num_virtual_tokens", required=True), columns)}


def _keys(kind: PeftType) -> frozenset[str]:
    own = {item.name for item in fields(config_class(kind)) if not item.metadata.get("ours")}
    return frozenset(own | OUR_KEYS if kind is PeftType.EXTENDED_PROMPT_TUNING else own)


_PER_LAYER = (_keys_and_values, "num_virtual_tokens, num_layers * 2 * token_dim")
_OTHERS: Mapping[PeftType, tuple[Any, ...]] = {
    PeftType.MULTITASK_PROMPT_TUNING: (_factors,),
    PeftType.PREFIX_TUNING: _PER_LAYER,
    PeftType.CARTRIDGE: _PER_LAYER,
}
LAYOUTS: Mapping[PeftType, PeftLayout] = {
    kind: PeftLayout(_keys(kind), *_OTHERS.get(kind, (_virtual_tokens,))) for kind in PeftType
}


def config_json(config: Mapping[str, Any]) -> str:
    """Return the text of ``adapter_config.json``, keys sorted, as PEFT writes it.

    Raises:
        ArtifactError: a method or a key PEFT does not know, or a value JSON cannot hold.
    """
    allowed = layout_of(config).keys
    for key in config:
        if key not in allowed:
            raise ArtifactError(
                f"{CONFIG_NAME} can hold PEFT's keys only, got {key!r}{nearest(key, allowed)}: "
                "put settings of our own into softprompt.json"
            )
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"expected plain JSON values in {CONFIG_NAME} ({error}): pass config.to_dict()"
        ) from error


def check_config(config: Mapping[str, Any]) -> None:
    """Check a configuration before the weights are read: the method, the types of all values, and the sizes.

    Raises:
        ArtifactError: the method is not supported, a value has another type, or a size is not a count.
    """
    layout_of(config).shapes(config)
    check_types(config_class(config["peft_type"]), config, CONFIG_NAME, ArtifactError)


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ArtifactError unless names, shapes, dtypes and values of tensors suit their configuration."""
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
        if not _has_shape(tensor, shape, width):
            meaning = f" ({layout.meaning})" if name == PROMPT_KEY else ""
            raise ArtifactError(
                f"expected {name} [{', '.join('H' if s is None else str(s) for s in shape)}]"
                f"{meaning} in {where}, got {list(tensor.shape)}: "
                f"check that {CONFIG_NAME} belongs to these weights"
            )


def check_dtype(name: str, tensor: Tensor, where: str) -> None:
    """Raise ArtifactError unless a tensor has one of the floating types that prompts are stored in."""
    if tensor.dtype not in _DTYPES:
        raise ArtifactError(
            f"expected {name} in {where} to be float32, float16, bfloat16 or float64, got "
            f"{str(tensor.dtype).removeprefix('torch.')}: convert it with .float() and save again"
        )


def _has_shape(tensor: Tensor, shape: Shape, width: int) -> bool:
    """Tell whether a tensor has its sizes; a width the config leaves open is the prompt's."""
    wanted = [width if size is None else size for size in shape]
    return list(tensor.shape) == wanted and tensor.numel() > 0


def check_values(name: str, tensor: Tensor, where: str) -> None:
    """Raise ArtifactError unless a tensor is dense and holds finite numbers."""
    # Sparse tensors skip bounds checks when densified (CVE-2025-62164); none is legitimate here.
    plain = tensor.layout == torch.strided and not tensor.is_nested
    if not plain or tensor.is_quantized or tensor.is_meta:
        raise ArtifactError(f"expected plain dense tensors in {where}, {name} is not: save it as .to_dense()")
    # Part by part, for the masks take memory too.
    parts = torch.split(tensor.reshape(-1), 1 << 20) if tensor.is_floating_point() else ()
    if broken := sum(int((~torch.isfinite(part.float())).sum()) for part in parts):
        raise ArtifactError(
            f"expected finite numbers in {name} of {where}, {broken} of {tensor.numel()} are NaN "
            "or infinite: use an earlier checkpoint, or train again at a lower learning rate"
        )


def portable(value: Any, directory: Path) -> Any:
    """Return plain values for a file in ``directory``, paths below the working directory relative to it, ``./…``.

    A path stays as it is where ``directory`` is elsewhere, since nothing would lead from it to the path.
    """
    here = Path.cwd()
    if here == here.parent or not directory.resolve().is_relative_to(here):
        return value

    def named(path: str) -> str:
        inside = os.path.isabs(path) and Path(path).is_relative_to(here) and os.path.exists(path)
        return f"./{Path(path).relative_to(here).as_posix()}" if inside else path

    return each_text(value, named)


def anchored(value: Any, directory: Path) -> Any:
    """Return what ``portable`` made for ``directory``, its paths found from here, or from a folder above that."""

    def found(path: str) -> str:
        if not path.startswith("./") or os.path.exists(path):
            return path
        places = (above / path for above in (directory.resolve(), *directory.resolve().parents))
        return next((str(place) for place in places if place.exists()), path)

    return each_text(value, found)


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain values with each text inside, but for the keys of mappings, as ``change`` gives it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: each_text(inner, change) for name, inner in value.items()}
    return [each_text(inner, change) for inner in value] if isinstance(value, list | tuple) else value
