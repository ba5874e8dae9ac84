"""``mlx-lm``: a prompt of keys and values as the prompt cache of mlx-lm, which continues behind it.

The file is what ``save_prompt_cache`` of mlx-lm 0.32 writes (``mlx_lm/models/cache.py``): for layer i the keys
``i.0`` and values ``i.1``, both ``[1, A_kv, P, D]``, and the tokens that they hold, ``i.2``. Its metadata are a
flattened list: ``0.<name>`` what the user notes, ``1.i`` the class of layer i's cache, ``2.<j>`` which arrays are
plain numbers. Keys stand there after their rotation, as in transformers' caches and in PEFT's files, and
the next token has position P, as with us.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as bytes_from_tensors

from softprompt.artifacts.formats.format import MEASURED, USED, Export, Format, write_output_file
from softprompt.backbone import Base
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import KEY_VALUE_METHODS, PROMPT_KEY, FlatOrder

_SUFFIX = ".safetensors"
_CACHE = "KVCache"
_HEADER_BYTES = 1 << 16
"""Metadata stand at the beginning of the file."""


def _lacks(path: Path) -> str | None:
    if not path.is_file() or path.suffix != _SUFFIX:
        return f"not a {_SUFFIX} file"
    with path.open("rb") as file:
        return None if f'"{_CACHE}"'.encode() in file.read(_HEADER_BYTES) else f"no {_CACHE} in its metadata"


def _other_caches(base: Base) -> bool:
    config = base.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    plain = set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
    return not plain or base.prefix_sources is not None


def _write(export: Export, path: Path) -> Mapping[str, Any]:
    stored, base, where = export.single(), export.loaded(), export.stored.location
    kind = stored.config["peft_type"]
    if kind not in KEY_VALUE_METHODS or stored.seq2seq:
        raise ArtifactError(
            f"{where} cannot be written as mlx-lm: it is {'for a seq2seq model' if stored.seq2seq else kind}, and "
            "a prompt cache holds keys and values of a causal model (CARTRIDGE, PREFIX_TUNING)"
        )
    if _other_caches(base):
        raise ArtifactError(
            f"{where} cannot be written as mlx-lm, which keeps other caches than {_CACHE} for {base.name} "
            "(sliding windows, or keys and values that layers share); use its prompts with softprompt"
        )
    if path.suffix != _SUFFIX:
        raise ConfigError(f"mlx-lm writes a {_SUFFIX} file, got {path.name!r}; end its name in {_SUFFIX}")
    order = FlatOrder.of(stored.configuration())
    dtype = getattr(torch, stored.manifest.dtype if stored.manifest else "float32")
    prefix = order.unflattened(order.read(stored.tensors)[PROMPT_KEY]).to(dtype)  # [L, 2, A_kv, P, D]
    if not bool(torch.isfinite(prefix).all()):
        raise ArtifactError(
            f"the keys and values of {where} overflow {dtype}, the base's dtype; train it in bfloat16"
        )
    metadata = {"0.model": stored.base_model or base.name, "0.tokenizer_config": "{}", "2.0": ""}
    tensors: dict[str, torch.Tensor] = {}
    for layer, (keys, values) in enumerate(prefix):
        tensors |= {f"{layer}.0": keys[None].contiguous(), f"{layer}.1": values[None].contiguous()}
        tensors[f"{layer}.2"] = torch.tensor(order.tokens, dtype=torch.int32)
        metadata |= {f"1.{layer}": _CACHE, f"2.{layer + 1}.0": f"{layer}.2", f"2.{layer + 1}.1": "scalar"}
    write_output_file(path, bytes_from_tensors(tensors, metadata=metadata), overwrite=export.overwrite)
    return {"tokens": order.tokens, "layers": order.layers, "dtype": str(dtype).removeprefix("torch.")}


MLX_LM = Format(
    "mlx-lm",
    f"a {_SUFFIX} file, a prompt cache of mlx-lm",
    _lacks,
    None,
    _write,
    writes_with_base=True,
    holds="file",
    loses=("template", *USED, *MEASURED, "base_fingerprint"),
)
