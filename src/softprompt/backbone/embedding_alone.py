"""A base of which only the input embedding is in memory: for a server whose passes run elsewhere.

Everything that is asked of such a base without a pass is answered: its facts, its fingerprint, an id's embedding.
The other weights are mapped from their safetensors files, so that they take no memory until they are looked at;
those that a file has under another name than the model stay away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from softprompt.backbone.state import input_embedding
from softprompt.errors import BackboneError

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def embedding_alone(
    loader: Any, config: Any, source: str, dtype: torch.dtype | None, *, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """Return a model that cannot be run, with its embedding in memory.

    Args:
        loader: The Auto class of its kind.
        config: Its configuration.
        source: Its folder or Hub id.
        dtype: Of the embedding; None is the configuration's, or else the files'.
        trust_remote_code: Whether to run code that it brings along.
        **options: ``revision`` and ``local_files_only``, as transformers takes them.

    Raises:
        BackboneError: Its weights are no safetensors files, or the embedding is not among them.
    """
    with _weights_on_meta():
        model: PreTrainedModel = loader.from_config(config, trust_remote_code=trust_remote_code)
    prefix = f"{model.base_model_prefix}."
    known = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, weight in _mapped(source, options):
        own = name if name in known else prefix + name
        if known.get(own) == tuple(weight.shape):
            found[own] = weight
    model.load_state_dict(found, strict=False, assign=True)
    table = input_embedding(model)
    if table.weight.is_meta:
        raise BackboneError(f"the files of {source} hold no tensor for {type(model).__name__}'s input embedding")
    dtype = dtype or config.dtype or table.weight.dtype
    # A copy: pages of a file may go while it is replaced.
    table.weight = nn.Parameter(table.weight.detach().to(dtype, copy=True), requires_grad=False)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source, **options)
    except OSError:  # there is no such file, and what the configuration says holds
        pass
    return model.requires_grad_(False)


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Make modules whose parameters have no storage; buffers, which are computed, keep theirs."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        register(module, name, None if weight is None else nn.Parameter(weight.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _mapped(source: str, options: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's safetensors files, in memory that is the files'."""
    missing = {"_raise_exceptions_for_missing_entries": False, **options}
    index = cached_file(source, _INDEX, **missing)
    files = sorted({*json.loads(Path(index).read_text())["weight_map"].values()}) if index else [_FILE]
    for file in files:
        path = cached_file(source, file, **missing)
        if path is None:
            raise BackboneError(f"expected {file} in {source}, it has none; save the base as safetensors")
        with safe_open(path, "pt") as stored:
            for name in stored.keys():
                yield name, stored.get_tensor(name)
