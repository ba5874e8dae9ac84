"""Loading a base model and its tokenizer from a folder, the Hub, or memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from softprompt.backbone.base import Base, freeze
from softprompt.backbone.embedding_alone import embedding_alone
from softprompt.backbone.sharding import device_of_process, reading, shard_layers
from softprompt.backbone.state import is_encoder_decoder
from softprompt.bundled import DEMO, source_of
from softprompt.errors import BackboneError, ConfigError, first_line, nearest, no_folder
from softprompt.progress import phase

_trusting: ContextVar[bool] = ContextVar("trusting", default=False)


def trust_code() -> None:
    """Let the bases that this context loads from now on run the code that they bring along, as a user asked for."""
    _trusting.set(True)


def trusts_code() -> bool:
    """Whether ``trust_code`` was called, for a process that is to load the same."""
    return _trusting.get()


def load_base(
    name_or_path: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seq2seq: bool | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    shard: str | None = None,
    runs: bool = True,
) -> Base:
    """Load a causal or seq2seq language model with its tokenizer.

    A name that is no folder is looked up in the local Hub cache, and downloaded only when the
    environment variable ``ALLOW_DOWNLOADS`` is ``true`` (caikit's rule).

    Args:
        name_or_path: Folder, Hub id, ``"demo"``, GGUF file, or a model in memory.
        tokenizer: Used instead of the one beside the model.
        seq2seq: Forces the kind; None reads it from the config.
        torch_dtype: Such as ``"bfloat16"``; None keeps the checkpoint's. A model in memory is converted in place.
        device: Such as ``"cuda:0"``; None keeps the CPU or the model's own.
        revision: Revision on the Hub.
        trust_remote_code: Run the code that the model or its tokenizer brings along (``auto_map``); None does where
            ``trust_code`` was called.
        shard: Spread the weights over the processes of torch.distributed: ``"fsdp"`` or ``"tp"``; see
            docs/distributed.md. The base is frozen, and every process must call this and run the same passes.
        runs: Whether it will be run here; otherwise its embedding alone is kept in memory.

    Raises:
        BackboneError: If there is no such model, it is not one of these kinds, or cannot be sharded.
        ConfigError: For an unknown dtype, or ``shard`` in a process that was started alone.
    """
    dtype = parse_dtype(torch_dtype)
    trust_remote_code = _trusting.get() if trust_remote_code is None else trust_remote_code
    if shard is not None and device is not None:
        raise ConfigError("device would be ignored with shard: each process takes its own; leave it out")
    place = None if shard is None else device_of_process(shard)
    if isinstance(name_or_path, PreTrainedModel):
        base = _in_memory(name_or_path, tokenizer, dtype, device, trust_remote_code)
        if shard == "tp" and not base.shard:
            raise ConfigError("shard tp splits a base while it is read; give its folder or name, or use shard fsdp")
        return _sharded(base, place)
    name = str(name_or_path)
    try:
        source, file = source_of(name)
    except ImportError as cause:
        raise BackboneError(str(cause)) from cause
    if shard is not None and file:
        raise ConfigError("a GGUF file cannot be sharded; give the folder of the model that it was made from")
    local = Path(source, *file.values()).exists()
    if revision is None and not local and (misspelt := no_folder(name, before_hub=True)):
        raise BackboneError(f"base model: {misspelt}")
    options: dict[str, Any] = {
        **file,
        "revision": revision,
        "local_files_only": not (local or downloads_allowed()),
        "trust_remote_code": trust_remote_code,  # unset, transformers asks on stdin
    }
    with phase("loading", f"loading {name}"):
        try:
            with progress_on_terminals_only():
                model = _read(source, seq2seq, dtype, shard, options, runs=runs)
            words = tokenizer or AutoTokenizer.from_pretrained(source, **options)
        except BackboneError:
            raise
        except Exception as cause:
            raise BackboneError(_why_not_loaded(name, local, cause)) from cause
        if file:
            model.name_or_path = model.config._name_or_path = name  # not its folder alone: prompts record it
            if all(weight.is_floating_point() for weight in model.parameters()):
                cast(Any, model).hf_quantizer.remove_quantization_config(model)  # it may be saved again
        if device is not None:
            cast(Any, model).to(parse_device(device))
        base = Base(cast(Any, model).eval(), words, name)
        return _sharded(base, place)


def _read(
    source: str, seq2seq: bool | None, dtype: Any, shard: str | None, options: Mapping[str, Any], *, runs: bool
) -> PreTrainedModel:
    """Read a model, or its embedding alone where it does not run here; ``options`` are those of transformers."""
    config = AutoConfig.from_pretrained(source, **options)
    kind = bool(getattr(config, "is_encoder_decoder", False)) if seq2seq is None else seq2seq
    loader = AutoModelForSeq2SeqLM if kind else AutoModelForCausalLM
    if not runs:
        return embedding_alone(loader, config, source, dtype, **options)
    more = {} if shard is None else reading(shard, loader, config, options)
    return cast(PreTrainedModel, loader.from_pretrained(source, dtype=dtype or "auto", **options, **more))


def _sharded(base: Base, place: torch.device | None) -> Base:
    """Return a base, for devices of several processes frozen and sharded where its loading has not.

    Its fingerprint, which all take part in, is kept.
    """
    if place is None:
        return base
    if not base.shard:
        shard_layers(base.model, place)
    freeze(base.model)
    base.fingerprint_record()
    return base


@contextmanager
def progress_on_terminals_only() -> Iterator[None]:
    """Keep transformers' loading and saving bars out of logs and pipes."""
    if sys.stderr.isatty() or not hf_logging.is_progress_bar_enabled():
        yield
        return
    cast(Any, hf_logging).disable_progress_bar()
    try:
        yield
    finally:
        cast(Any, hf_logging).enable_progress_bar()


def downloads_allowed() -> bool:
    """Tell whether ``ALLOW_DOWNLOADS`` permits fetching from the Hub."""
    return os.environ.get("ALLOW_DOWNLOADS", "").lower() in ("1", "true", "yes")


def parse_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """Turn ``"bfloat16"`` and the like into a torch dtype.

    Raises:
        ConfigError: If it is none of the floating dtypes that a model can have.
    """
    if value is None or isinstance(value, torch.dtype):
        return value
    known: Mapping[str, torch.dtype] = {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float64": torch.float64,
    }
    name = value.removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"torch_dtype must be one of {', '.join(known)}, got {value!r}")
    return known[name]


def parse_device(value: str) -> torch.device:
    """Turn a device name into a device that is there.

    Raises:
        ConfigError: If the name is not one of torch's, or the machine has no such device.
    """
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as cause:
        raise ConfigError(f"device {value!r} cannot be used here ({first_line(cause)}); try 'cpu'") from cause
    return device


def _in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: str | None,
    trust_remote_code: bool,
) -> Base:
    name = str(model.config._name_or_path or model.name_or_path)
    if tokenizer is None:
        try:
            source, options = source_of(name)
            tokenizer = AutoTokenizer.from_pretrained(
                source, **options, local_files_only=not downloads_allowed(), trust_remote_code=trust_remote_code
            )
        except Exception as cause:
            raise BackboneError(
                f"no tokenizer beside the model in memory (name {name!r}); pass tokenizer=…"
            ) from cause
    if dtype is not None:
        _moved(model, "torch_dtype", dtype)
    if device is not None:
        _moved(model, "device", parse_device(device))
    if not (model.can_generate() or is_encoder_decoder(model)):
        raise BackboneError(
            f"{type(model).__name__} is neither a causal nor a seq2seq language model; "
            "use get_peft_model for other tasks"
        )
    return Base(model, tokenizer, name)


def _moved(model: PreTrainedModel, setting: str, to: torch.dtype | torch.device) -> None:
    """Convert or move a model in place; parts of one that is offloaded would be left out in silence."""
    try:
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError("its layers are offloaded")
        cast(Any, model).to(to)
    except (ValueError, RuntimeError) as cause:
        raise ConfigError(
            f"{setting} cannot be changed on this model ({first_line(cause)}); leave it out, or load the model so"
        ) from cause


def _why_not_loaded(name: str, local: bool, cause: Exception) -> str:
    first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if "trust_remote_code" in str(cause):
        return (
            f"base model {name!r} would run code that it brings along (auto_map in its files); read it, and "
            "pass --trust-remote-code (trust_remote_code=True in Python) if you trust it"
        )
    if local:
        return f"base model {name!r} cannot be loaded: {first}"
    if misspelt := no_folder(name):
        return f"base model: {misspelt} ({first[:160]})"
    advice = "check the connection" if downloads_allowed() else "set ALLOW_DOWNLOADS=true to fetch it"
    return (
        f"base model {name!r}{nearest(name, [DEMO])} is neither a folder nor a GGUF file nor in the local "
        f"Hub cache; check the path, use '{DEMO}', or {advice} ({first[:160]})"
    )
