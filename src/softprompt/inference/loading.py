"""Reading prompts back onto the base model they were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.attach import PeftModel
from softprompt.errors import ConfigError
from softprompt.inference.continuous.bounds import Bounds
from softprompt.inference.detached import DetachedPrompt
from softprompt.inference.prompt_choice import check_names
from softprompt.inference.serving import Serving
from softprompt.inference.stored import record_of, stored_prompts
from softprompt.inference.tuned import TunedPrompt

_FIRST = "default"


@overload
def load(
    prompts: str | Path,
    base_model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    ignore_fingerprint: bool = False,
) -> TunedPrompt: ...


@overload
def load(
    prompts: Mapping[str, str | Path],
    base_model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    ignore_fingerprint: bool = False,
    bounds: Bounds | None = None,
) -> Serving: ...


def load(
    prompts: str | Path | Mapping[str, str | Path],
    base_model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    ignore_fingerprint: bool = False,
    bounds: Bounds | None = None,
) -> TunedPrompt | Serving:
    """Load what softprompt or PEFT wrote, with its base model: one prompt, or many that answer together.

    A folder without ``softprompt.json`` is PEFT's own: its input is put as it is
    (``{{input}}``), and it generates.

    Args:
        prompts: Folder of the prompt, or ``org/name`` on the Hub; or several of them, of any kinds, by
            the names to ask for them by.
        base_model: Folder, Hub id, or a model in memory, which is put into evaluation mode;
            None takes the one on record (with the first prompt).
        tokenizer: Used instead of the base model's own.
        torch_dtype: dtype of the base; None takes the recorded one, or leaves a model in
            memory as it is.
        device: Such as "cuda:0"; None is the CPU, or where a model in memory is.
        ignore_fingerprint: Use prompts on a base they were not made for.
        bounds: What many prompts together may use at most.

    Returns:
        A ``TunedPrompt`` for a folder, a ``Serving`` for a mapping.

    Raises:
        ConfigError: The mapping is empty or has odd names, the recorded dtypes differ, or bounds are
            given for one prompt.
        ArtifactError: A folder is missing or damaged, or names no base model.
        BackboneError: The base model cannot be loaded.
        FingerprintError: The base is not the one a prompt was made for.
    """
    reading = {"tokenizer": tokenizer, "torch_dtype": torch_dtype, "device": device}
    if isinstance(prompts, Mapping):
        return _served(prompts, base_model, reading, ignore_fingerprint, bounds)
    if bounds is not None:
        raise ConfigError(
            "bounds are for prompts by name, load({name: folder}); leave them out for one prompt"
        )
    _check_folder(prompts)
    return _attached([prompts], base_model, reading, ignore_fingerprint)[0]


def load_many(
    directories: Sequence[str | Path],
    base_model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    torch_dtype: str | torch.dtype | None = None,
    device: str | None = None,
    ignore_fingerprint: bool = False,
) -> list[TunedPrompt]:
    """Load several prompts of one base model, which is loaded once; see ``load``.

    Args:
        directories: Folders of the prompts, or names on the Hub, at least one.
        base_model: As for ``load``; None takes the one on record with the first prompt.
        tokenizer: Used instead of the base model's own.
        torch_dtype: dtype of the base; None takes the recorded one, which must then be the same.
        device: Such as "cuda:0".
        ignore_fingerprint: Use prompts on a base they were not made for.

    Raises:
        ConfigError: No prompt is named, or the recorded dtypes differ.
        ArtifactError: A folder is missing or damaged, or the first names no base model.
        BackboneError: The base model cannot be loaded.
        FingerprintError: The base is not the one a prompt was made for.
    """
    if isinstance(directories, str | Path | Mapping) or not directories:
        raise ConfigError(f"expected the folders of one prompt or more, got {directories!r}")
    reading = {"tokenizer": tokenizer, "torch_dtype": torch_dtype, "device": device}
    return _attached(directories, base_model, reading, ignore_fingerprint)


def _attached(
    directories: Sequence[str | Path],
    base_model: str | Path | PreTrainedModel | None,
    reading: Mapping[str, Any],
    ignore_fingerprint: bool,
) -> list[TunedPrompt]:
    found, base = stored_prompts(directories, base_model, **reading)
    names = [_FIRST, *(f"prompt{number}" for number in range(2, len(found) + 1))]
    model = PeftModel.from_pretrained(
        base.model, found[0].location, names[0], ignore_fingerprint=ignore_fingerprint
    )
    for name, stored in zip(names[1:], found[1:], strict=True):
        model.load_adapter(stored.location, name, ignore_fingerprint=ignore_fingerprint)
    return [
        TunedPrompt(model, base.tokenizer, record_of(stored, base), name)
        for name, stored in zip(names, found, strict=True)
    ]


def _served(
    folders: Mapping[str, str | Path],
    base_model: str | Path | PreTrainedModel | None,
    reading: Mapping[str, Any],
    ignore_fingerprint: bool,
    bounds: Bounds | None,
) -> Serving:
    """Read prompts beside one base, which does not come to know of them: kinds may differ."""
    check_names(folders)
    for folder in folders.values():
        _check_folder(folder)
    found, base = stored_prompts(list(folders.values()), base_model, **reading)
    prompts = {
        name: DetachedPrompt.of_stored(stored, base, ignore_fingerprint=ignore_fingerprint)
        for name, stored in zip(folders, found, strict=True)
    }
    return Serving(prompts, bounds)


def _check_folder(given: object) -> None:
    if not isinstance(given, str | Path):
        raise ConfigError(
            f"expected a prompt's folder, or folders by name, {{'a': ..., 'b': ...}}, got {given!r}; "
            "Serving({name: prompt}) takes prompts that are loaded"
        )
