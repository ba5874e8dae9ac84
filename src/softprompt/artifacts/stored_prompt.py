"""A prompt as it was read from disk: its configuration, its ``Prompt``, its tasks, and the base it was made for."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts.layout import LAYOUTS, OUR_KEYS, anchored
from softprompt.artifacts.manifest import Manifest, manifest_of_task
from softprompt.backbone import Base, Fingerprint, input_embedding
from softprompt.errors import IGNORING, ArtifactError, ConfigError, FingerprintError, nearest
from softprompt.prompts import (
    COLS_KEY,
    KEY_VALUE_METHODS,
    PROMPT_KEY,
    ROWS_KEY,
    PeftConfig,
    PeftType,
    Prompt,
    PromptLearningConfig,
    PromptTuningConfig,
    TaskType,
)

logger = logging.getLogger(__name__)

_PART_NAMES = {"ENCODER": "input", "DECODER": "answer"}
"""What errors call the parts of the base that ``output_model_types`` names."""
_SEQ2SEQ = {TaskType.CAUSAL_LM: False, TaskType.SEQ_2_SEQ_LM: True}


@dataclass(frozen=True)
class StoredPrompt:
    """The content of a prompt's folder, checked.

    Attributes:
        config: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``, on the CPU in the stored dtype.
        manifest: ``softprompt.json``; None for a folder that PEFT wrote.
        location: The folder, for errors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    manifest: Manifest | None
    location: str

    @property
    def base_model(self) -> str | None:
        """Name or path of the base, from ``softprompt.json`` or else PEFT's config; None when unknown."""
        recorded = self.manifest.base_model if self.manifest else None
        name = recorded or self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def seq2seq(self) -> bool:
        """Whether the base is a model with an encoder and a decoder that writes text."""
        return self.config.get("task_type") == TaskType.SEQ_2_SEQ_LM

    @property
    def values(self) -> Tensor:
        """``prompt_embeddings``: virtual tokens ``[P*S, H]``, or keys and values ``[P, L*2*H_kv]``."""
        return self.tensors[PROMPT_KEY]

    @property
    def options(self) -> dict[str, Any]:
        """The options that PEFT does not have, where they are set."""
        return {key: self.config[key] for key in sorted(OUR_KEYS) if self.config.get(key)}

    def configuration(self) -> PromptLearningConfig:
        """Return the configuration as an object, in inference mode, with the S that is run.

        Raises:
            ConfigError: a key or a value is not supported.
        """
        # Training further must not tokenise the initial text again: the stored values replace it.
        values = self.config | {"inference_mode": True, "num_transformer_submodules": self._submodules()}
        return cast(PromptLearningConfig, PeftConfig.from_file(values))

    def model_types(self) -> tuple[str, ...]:
        """Return the parts of the base that get virtual tokens, ENCODER, DECODER or both.

        Raises:
            ConfigError: the options are not supported.
        """
        return self._placed().model_types()

    def prompt(self) -> Prompt:
        """Return the virtual tokens ``[P, H]`` of each part of the base, in the stored dtype.

        PEFT writes 2 P virtual tokens for a seq2seq model and reads the first P of them.

        Raises:
            ArtifactError: the folder holds more than the virtual tokens of one task.
            ConfigError: the options are not supported.
        """
        reason = self.beyond_tokens()
        if reason is not None:
            raise ArtifactError(f"{self.location} cannot be composed, compared or started from: {reason}")
        values = self.values
        if self.seq2seq:
            values = values[: int(self.config["num_virtual_tokens"]) * self._submodules()]
        return self._placed().prompt_of(values)

    def virtual_tokens(self) -> Tensor:
        """Return the virtual tokens ``[S, P, H]`` of all parts of the base, in float32; see ``prompt``."""
        return torch.stack([part.float() for part in self.prompt().tensors])

    @property
    def keys_and_values(self) -> bool:
        """Whether it is keys and values of every layer, rather than virtual tokens."""
        return self.config.get("peft_type") in KEY_VALUE_METHODS

    def beyond_tokens(self) -> str | None:
        """Return why this is more than the virtual tokens of one task; None when it is just those."""
        kind = self.config["peft_type"]
        if self.keys_and_values:
            return "it is keys and values of every layer, not virtual tokens of the input"
        if kind == PeftType.MULTITASK_PROMPT_TUNING:
            return (
                "it holds the factors of its tasks; write one of them with `softprompt convert --to "
                "softprompt --task-name`"
            )
        heads = sorted(name for name in self.tensors if name != PROMPT_KEY)
        if heads:
            return f"it has trained parts besides its virtual tokens ({', '.join(heads[:3])})"
        return None

    def of_task(self, task: str | None) -> StoredPrompt:
        """Return one task of a multitask prompt as plain prompt tuning; any other prompt as it is.

        The virtual tokens are ``prompt_embeddings * (cols[k] @ rows[k])`` (Wang et al. 2023), in float32.

        Args:
            task: a number or a recorded name; required where there are several.

        Raises:
            ConfigError: a task for a prompt that has none, no task, or one it does not have.
        """
        if self.config["peft_type"] != PeftType.MULTITASK_PROMPT_TUNING:
            if task is not None:
                raise ConfigError(
                    f"a task ({task!r}) selects a part of a multitask prompt, {self.location} is "
                    f"{self.config['peft_type']}; leave the task out"
                )
            return self
        index = self._task_index(task)
        factors = (COLS_KEY, ROWS_KEY)
        shared, cols, rows = (self.tensors[key].float() for key in (PROMPT_KEY, *factors))
        tensors = {name: t for name, t in self.tensors.items() if name not in factors}
        tensors[PROMPT_KEY] = shared * (cols[index] @ rows[index])
        manifest = self.manifest
        if manifest is not None:
            manifest = dataclasses.replace(manifest_of_task(manifest, index), tasks=None)
        return StoredPrompt(_plain_config(self.config), tensors, manifest, self.location)

    def _placed(self) -> PromptTuningConfig:
        """Return a configuration of what says where virtual tokens go, and nothing else.

        Composing and converting a prompt must not fail over options that only training reads.
        """
        kept = {name: self.config[name] for name in ("task_type", *OUR_KEYS) if name in self.config}
        return PromptTuningConfig(num_transformer_submodules=self._submodules(), **kept)

    def _submodules(self) -> int:
        """Return S as it is run: PEFT writes 2 for any seq2seq prompt, and reads both halves of few."""
        if self.config.get("peft_type") == PeftType.MULTITASK_PROMPT_TUNING:
            return int(self.config.get("num_transformer_submodules") or (2 if self.seq2seq else 1))
        return 2 if len(self.config.get("output_model_types") or ()) == 2 else 1

    def _task_index(self, task: str | None) -> int:
        count = len(self.tensors[COLS_KEY])
        names = (self.manifest.tasks if self.manifest else None) or ()
        known = ", ".join(names) or f"0 to {count - 1}"
        if task is None:
            if count == 1:
                return 0
            raise ConfigError(
                f"{self.location} holds {count} tasks ({known}); name the one to convert: "
                "task_name=..., or --task-name on the command line"
            )
        if task in names:
            return names.index(task)
        if task.isdecimal() and int(task) < count:
            return int(task)
        raise ConfigError(f"{self.location} has no task {task!r}{nearest(task, names)}; it has {known}")


def tensors_read(
    tensors: Mapping[str, Tensor], config: PromptLearningConfig, *, seq2seq: bool
) -> Mapping[str, Tensor]:
    """Return a file's tensors without virtual tokens that nothing reads: PEFT saves 2 P for seq2seq and reads P.

    Args:
        tensors: What a file holds, under PEFT's names.
        config: Configuration of the prompt, its sizes filled in.
        seq2seq: Whether the base has an encoder and a decoder.
    """
    values = tensors.get(PROMPT_KEY)
    reads_half = seq2seq and config.num_transformer_submodules == 1
    if not reads_half or values is None or len(values) != 2 * (config.num_virtual_tokens or 0):
        return tensors
    return {**tensors, PROMPT_KEY: values[: len(values) // 2]}


def other_parts(found: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Return why virtual tokens for some parts of a base do not fit other parts; None when they do."""
    if tuple(found) == tuple(wanted):
        return None
    return f"its virtual tokens stand before the {_listed(found)}, not before the {_listed(wanted)}"


def _listed(parts: Sequence[str]) -> str:
    return " and the ".join(_PART_NAMES[part] for part in parts)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of one task of a multitask prompt."""
    keys = LAYOUTS[PeftType.PROMPT_TUNING].keys
    plain = {name: value for name, value in config.items() if name in keys}
    plain |= {"peft_type": str(PeftType.PROMPT_TUNING), "prompt_tuning_init": "RANDOM"}
    for name in ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):
        plain[name] = None
    return plain


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """What is known of a base, from a prompt's files or from a model itself.

    Attributes:
        name: Its name or path; None when not known.
        width: H of its embeddings.
        fingerprint: Of its weights; None when not known.
    """

    name: str | None
    width: int
    fingerprint: Fingerprint | None

    @classmethod
    def of_stored(cls, stored: StoredPrompt) -> Self:
        """Return the base that a stored prompt records; an empty fingerprint is an unknown one.

        Raises:
            ArtifactError: The recorded fingerprint is damaged.
        """
        return cls(stored.base_model, stored.values.shape[1], _recorded_fingerprint(stored))

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self:
        """Return the base that a loaded model is."""
        width = input_embedding(model).weight.shape[1]
        return cls(str(model.name_or_path) or None, width, Base(model).fingerprint)

    def differs(self, other: RecordedBase) -> str | None:
        """Return why the other is not this base; None when it is.

        Fingerprints decide; where one of the two has none, the names do.
        """
        if self.width != other.width:
            return f"its virtual tokens are {other.width} wide, not {self.width}"
        here, there = self.fingerprint, other.fingerprint
        if here is not None and there is not None:
            reason = here.differs(there)
            return reason and f"its base is {other.name}, not {self.name} ({reason})"
        if self.name != other.name:
            return f"its base is {other.name}, not {self.name}, and not both have a fingerprint"
        return None


def other_base(first: StoredPrompt, second: StoredPrompt) -> str | None:
    """Return why two prompts are not of one base; None when they are."""
    return RecordedBase.of_stored(first).differs(RecordedBase.of_stored(second))


def check_base(
    stored: StoredPrompt, model: PreTrainedModel, *, ignore: bool = False, way_out: str = f"pass {IGNORING}"
) -> None:
    """Check a model's weights against the fingerprint that a prompt records, where it has one.

    The same model stored otherwise (quantised, offloaded, with more tokens) passes, with a line in the log.

    Args:
        stored: The prompt.
        model: The base.
        ignore: Use the base all the same.
        way_out: What to do to use it all the same, for the error.

    Raises:
        FingerprintError: It is another model and that is not ignored.
        ArtifactError: The recorded fingerprint is damaged.
    """
    made_for = None if ignore else _recorded_fingerprint(stored)
    if made_for is None:
        return
    here = Base(model).fingerprint
    name = getattr(model, "name_or_path", "") or f"a {type(model).__name__} in memory"
    reason = made_for.differs(here)
    if reason is not None:
        raise FingerprintError(
            f"the prompt in {stored.location} was made for {stored.base_model}, this base is {name}, another "
            f"model: {reason}; load its own base, or {way_out}"
        )
    storage = made_for.stored_otherwise(here)
    if storage is not None:
        logger.info(
            "%s is the base of the prompt in %s (%s), stored otherwise: %s",
            *(name, stored.location, stored.base_model, storage),
        )


def check_fit(stored: StoredPrompt, base: Base) -> None:
    """Check that a base has the architecture and the width that a prompt needs, whatever its weights are.

    Raises:
        ArtifactError: It has others.
    """
    task, seq2seq = stored.config.get("task_type"), base.facts.is_encoder_decoder
    if task in _SEQ2SEQ and _SEQ2SEQ[task] != seq2seq:
        raise ArtifactError(
            f"the prompt in {stored.location} is for {task}, {base.name} is a "
            f"{'seq2seq' if seq2seq else 'causal'} model; name the base that it was made for"
        )
    if stored.config["peft_type"] not in KEY_VALUE_METHODS:
        check_width(stored.values.shape[1], base, stored.location)


def check_width(width: int, base: Base, where: str) -> None:
    """Check virtual tokens of width H against the embeddings of a base.

    Raises:
        ArtifactError: The widths differ.
    """
    own = base.facts.token_dim
    if width != own:
        raise ArtifactError(
            f"expected virtual tokens {own} wide in {where}, as the embeddings of {base.name}, got "
            f"{width}: name the base that the prompt was made for"
        )


def outside(base_model: str, directory: str | Path) -> str:
    """Return the base model that a prompt names, refused where it came along with the prompt.

    Who sends a prompt could send a model with it, and it would be loaded without having been asked for.

    Raises:
        ArtifactError: It does.
    """
    # A name of the Hub is a path below the working directory too.
    found = Path(os.path.realpath(anchored(base_model, Path(directory))))  # resolve() raises for a link to itself
    inside = found.is_relative_to(os.path.realpath(directory))
    if found.exists() and (inside or not os.path.exists(base_model)):
        where = "inside its own folder" if inside else "beside it, not in the working directory"
        raise ArtifactError(
            f"{directory} names a base model {where} ({found}), which is not loaded unasked; if "
            "you trust it, pass base_model (--base-model), or load it yourself for PeftModel.from_pretrained"
        )
    return base_model


def _recorded_fingerprint(stored: StoredPrompt) -> Fingerprint | None:
    # A format that records no weights of its base leaves the fingerprint empty.
    values = stored.manifest.base_fingerprint if stored.manifest else None
    return Fingerprint.from_dict(values) if values else None
