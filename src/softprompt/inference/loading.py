"""Loading prompts with the base model they were made for."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts import (
    Manifest,
    Origin,
    StoredPrompt,
    check_base,
    load_adapter,
    manifest_of,
    outside,
    started_prompt,
    tensors_read,
)
from softprompt.backbone import HEAD, Base, freeze, head_tensors, load_base, modules_named
from softprompt.data import SpecialFrame
from softprompt.engine import completed, require_isolated
from softprompt.errors import ArtifactError, ConfigError
from softprompt.generation import Bounds
from softprompt.inference.inputs import check_names
from softprompt.inference.serving import Serving
from softprompt.inference.tuned import TunedPrompt
from softprompt.prompts import (
    PROMPT_KEY,
    Placement,
    PromptLearningConfig,
    PromptTuningConfig,
    TaskType,
    check_fit,
    from_tokens,
    lookup,
    take_over,
)

Named = str | Path | PreTrainedModel
"""A base: its folder, GGUF file or Hub id, or a model in memory."""

_SEQ2SEQ = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}


class Reading(TypedDict, total=False):
    """How a base is read, and whether prompts that were made for another are put on it; see ``load``."""

    tokenizer: PreTrainedTokenizerBase | None
    torch_dtype: str | torch.dtype | None
    device: str | None
    shard: str | None
    trust_remote_code: bool
    ignore_fingerprint: bool


@overload
def load(prompts: str | Path, base_model: Named | None = None, **reading: Unpack[Reading]) -> TunedPrompt: ...


@overload
def load(
    prompts: Mapping[str, str | Path],
    base_model: Named | None = None,
    *,
    bounds: Bounds | None = None,
    **reading: Unpack[Reading],
) -> Serving: ...


def load(
    prompts: str | Path | Mapping[str, str | Path],
    base_model: Named | None = None,
    *,
    bounds: Bounds | None = None,
    **reading: Unpack[Reading],
) -> TunedPrompt | Serving:
    """Load what softprompt or PEFT wrote, with its base model: one prompt, or many that answer together.

    A folder without ``softprompt.json`` is PEFT's own: its input is put as it is (``{{input}}``), and it generates.

    Args:
        prompts: Folder of the prompt, or ``org/name`` on the Hub; or several of them, of any kinds, by
            the names that calls use.
        base_model: Folder, GGUF file, Hub id, or a model in memory, which is frozen and put into evaluation
            mode; None takes the one on record (with the first prompt).
        bounds: What many prompts together may use at most.
        **reading: ``tokenizer``, used instead of the base model's own; ``torch_dtype`` of the base, where
            None takes the recorded one, or leaves a model in memory as it is; ``device`` such as
            "cuda:0", where None is the CPU, or where a model in memory is; ``shard`` to spread a base over
            processes, "fsdp" or "tp"; ``trust_remote_code`` to run the
            code that a base brings along; ``ignore_fingerprint`` to use prompts on a base they were not
            made for.

    Returns:
        A ``TunedPrompt`` for a folder, a ``Serving`` for a mapping.

    Raises:
        ConfigError: The mapping is empty or has odd names, the recorded dtypes differ, or bounds are
            given for one prompt.
        ArtifactError: A folder is missing or damaged, or names no base model.
        BackboneError: The base model cannot be loaded.
        FingerprintError: The base is not the one a prompt was made for.
    """
    if isinstance(prompts, Mapping):
        check_names(prompts)
        folders = list(prompts.values())
    elif bounds is not None:
        raise ConfigError("bounds are for prompts by name, load({name: folder}); leave them out for one prompt")
    else:
        folders = [prompts]
    for folder in folders:
        if not isinstance(folder, str | Path):
            raise ConfigError(
                f"expected a prompt's folder, or folders by name, {{'a': ..., 'b': ...}}, got {folder!r}; "
                "Serving({name: prompt}) takes prompts that are loaded"
            )
    found = load_many(folders, base_model, **reading)
    if isinstance(prompts, Mapping):
        return Serving(dict(zip(prompts, found, strict=True)), bounds)
    return found[0]


def load_many(
    directories: Sequence[str | Path], base_model: Named | None = None, **reading: Unpack[Reading]
) -> list[TunedPrompt]:
    """Load several prompts of one base model, which is loaded once; see ``load``.

    Args:
        directories: Folders of the prompts, or names on the Hub, at least one.
        base_model: As for ``load``.
        **reading: As for ``load``.

    Raises:
        SoftPromptError: As ``load``; or no prompt is named.
    """
    if isinstance(directories, str | Path | Mapping) or not directories:
        raise ConfigError(f"expected the folders of one prompt or more, got {directories!r}")
    ignore = reading.pop("ignore_fingerprint", False)
    found, base = _read(directories, base_model, **reading)
    return [tuned_of(stored, base, ignore_fingerprint=ignore) for stored in found]


def tuned_of(stored: StoredPrompt, base: Base, *, ignore_fingerprint: bool = False) -> TunedPrompt:
    """Return a stored prompt on its base, which is read and not changed; another thread may be using it.

    Raises:
        ArtifactError: The tensors do not fit the configuration.
        ConfigError: The configuration does not fit the base.
        FingerprintError: The base is another one, and ``ignore_fingerprint`` is off.
    """
    check_base(stored, base.model, ignore=ignore_fingerprint)
    config = completed(stored.configuration(), base)
    require_isolated(config, base)
    module = started_prompt(config, base.model).to(base.device)
    own = {name: value for name, value in stored.tensors.items() if not name.startswith(HEAD)}
    module.load_stored(tensors_read(own, config, seq2seq=base.is_encoder_decoder))
    module.set_trainable(False)
    manifest = stored.manifest or manifest_of(Origin.of_base(base), base)
    return TunedPrompt(base, module, config, manifest, heads=_loaded_heads(stored, config, base))


def written(base: Base, manifest: Manifest, text: Sequence[int], *, chat: bool = False) -> TunedPrompt:
    """Return a prompt that nobody trained: its virtual tokens are the tokens of a text.

    It stands where the text would: behind the token that starts every input, where there is one, or in the
    system turn of a chat. Without a text there is one token in its place, for ``without_prompt`` to leave out.

    Raises:
        ConfigError: The base has no chat template with a system turn.
    """
    begins = bool(SpecialFrame.of(base.tokenizer).prefix)
    wanted = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        num_virtual_tokens=max(1, len(text)),
        placement=Placement.CHAT_SYSTEM if chat else Placement.AFTER_BOS if begins else Placement.PREFIX,
        inference_mode=True,  # nothing is drawn
    )
    config = completed(wanted, base)
    module = started_prompt(config, base.model)
    module.load_stored({PROMPT_KEY: from_tokens(max(1, len(text)), text or (0,), lookup(base.embedding))})
    module.set_trainable(False)
    return TunedPrompt(base, module.to(base.device), config, manifest)


def _loaded_heads(stored: StoredPrompt, config: PromptLearningConfig, base: Base) -> dict[str, nn.Module]:
    """Return the trained modules of a stored prompt in float32, by the path of the module they replace."""
    paths = modules_named(base.model, config.modules_to_save or [])
    heads = {path: copy.deepcopy(base.model.get_submodule(path)).float() for path in paths}
    own = head_tensors(heads)
    given = {name: value for name, value in stored.tensors.items() if name.startswith(HEAD)}
    left = sorted(given.keys() - own.keys())
    if left:
        raise ArtifactError(
            f"{stored.location} holds trained modules ({', '.join(left[:3])}) that modules_to_save does not "
            "name; name them there"
        )
    check_fit(own, given)
    take_over(own, given)
    for head in heads.values():
        head.requires_grad_(False)
    return heads


def _read(
    directories: Sequence[str | Path],
    base_model: Named | None,
    torch_dtype: str | torch.dtype | None = None,
    **reading: Any,
) -> tuple[list[StoredPrompt], Base]:
    """Read prompts, and their base once, which is frozen and put into evaluation mode."""
    found = [load_adapter(directory) for directory in directories]
    kinds = [_is_seq2seq(stored) for stored in found]
    named = recorded_base(found[0]) if base_model is None else base_model
    if torch_dtype is None and not isinstance(named, PreTrainedModel):
        torch_dtype = _recorded_dtype(found)
    base = load_base(named, seq2seq=kinds[0], torch_dtype=torch_dtype, **reading)
    base.model.eval()  # type: ignore[no-untyped-call]
    freeze(base.model)
    return found, base


def recorded_base(stored: StoredPrompt) -> str:
    """Return the base that a prompt names; raise ``ArtifactError`` where it names none, or one it brings along."""
    if stored.base_model is None:
        raise ArtifactError(
            f"{stored.location} does not say which base model it is for; pass base_model (--base-model)"
        )
    return outside(stored.base_model, stored.location)


def _recorded_dtype(found: Sequence[StoredPrompt]) -> str | None:
    dtypes = sorted({stored.manifest.dtype for stored in found if stored.manifest is not None})
    if len(dtypes) > 1:
        raise ConfigError(
            f"the prompts were made for a base in {' and '.join(dtypes)}; choose with --torch-dtype "
            "(torch_dtype=... in Python)"
        )
    return dtypes[0] if dtypes else None


def _is_seq2seq(stored: StoredPrompt) -> bool:
    task = stored.config.get("task_type")
    if task not in _SEQ2SEQ:
        raise ArtifactError(
            f"expected a prompt for CAUSAL_LM or SEQ_2_SEQ_LM in {stored.location}, got task_type "
            f"{task}; attach it with PeftModel.from_pretrained"
        )
    return _SEQ2SEQ[task]
