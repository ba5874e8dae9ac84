"""The configurations users write, under the names and defaults of PEFT.

A configuration knows its own JSON file (``adapter_config.json``), because saving and
loading one by itself is part of the contract; everything about weights lives in
``artifacts``. Construction validates and does no I/O.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from huggingface_hub import hf_hub_download

from softprompt.errors import ArtifactError, ConfigError, nearest
from softprompt.prompts.fields import member, positive
from softprompt.prompts.kinds import (
    Parameterization,
    PeftType,
    Placement,
    PromptTuningInit,
    TaskType,
)

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.prompts.prompt import Prompt

__all__ = [
    "CONFIG_NAME",
    "Parameterization",
    "PeftConfig",
    "PeftType",
    "Placement",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "configures",
]

CONFIG_NAME = "adapter_config.json"
"""File name of a saved configuration, PEFT's."""


@dataclass
class PeftConfig:
    """What every configuration has: the method, the task and the base model's name."""

    task_type: TaskType | str | None = field(default=None, metadata={"help": "Type of the task."})
    peft_type: PeftType | str | None = field(default=None, metadata={"help": "Method."})
    auto_mapping: dict[str, Any] | None = field(
        default=None, metadata={"help": "Base model class, for models without a task type."}
    )
    peft_version: str | None = field(default=None, metadata={"help": "Version that wrote it."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Base model."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model."})
    inference_mode: bool = field(default=False, metadata={"help": "Load frozen, for inference."})

    def __post_init__(self) -> None:
        """Validate the enumerations.

        Raises:
            ConfigError: For a task type or method that does not exist.
        """
        if self.task_type is not None:
            known = ", ".join(TaskType)
            if self.task_type not in list(TaskType):
                raise ConfigError(
                    f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {known}."
                )
            self.task_type = TaskType(self.task_type)
        if self.peft_type is not None:
            if self.peft_type not in list(PeftType):
                raise ConfigError(
                    f"peft_type must be one of {', '.join(PeftType)}, got {self.peft_type!r}; "
                    "this version trains and loads no other method"
                )
            self.peft_type = PeftType(self.peft_type)

    @property
    def is_prompt_learning(self) -> bool:
        """True: every configuration here trains a prompt."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, under PEFT's keys; fields marked ``ours`` are not among them."""
        ours = {f.name for f in dataclasses.fields(self) if f.metadata.get("ours")}
        return {
            key: str(value) if isinstance(value, StrEnum) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in ours
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build the configuration that ``peft_type`` names from saved values.

        A key we do not know is refused unless it is empty: files of newer PEFT versions
        carry unset options, and an option that is set changes what the prompt means.

        Raises:
            ConfigError: For an unknown method, or an unknown key that is set.
        """
        target = _config_class(values.get("peft_type"), cls)
        known = {f.name for f in dataclasses.fields(target)}
        kept: dict[str, Any] = {}
        for key, value in values.items():
            if key in known:
                kept[key] = value
            elif value not in (None, False, {}, [], ""):
                raise ConfigError(
                    f"{target.__name__} has no option {key!r}{nearest(key, known)}, and it is set to {value!r}; "
                    "remove it from the configuration, or upgrade softprompt"
                )
        config = target(**kept)
        if not isinstance(config, cls):
            raise ConfigError(f"expected a {cls.__name__}, the file holds a {target.__name__}")
        return config

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` into a directory, made if needed.

        Raises:
            ConfigError: If the path is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ConfigError(f"Provided path ({directory}) should be a directory, not a file")
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Read the configuration from a folder or a Hub repository.

        Raises:
            ArtifactError: If there is no readable ``adapter_config.json``.
            ConfigError: If its values are not valid.
        """
        name = str(pretrained_model_name_or_path)
        path = Path(name, subfolder or "", CONFIG_NAME)
        try:
            if not path.is_file():
                path = Path(
                    hf_hub_download(name, CONFIG_NAME, subfolder=subfolder, revision=revision)
                )
            values = json.loads(path.read_text(encoding="utf-8"))
        except Exception as cause:
            raise ArtifactError(
                f"Can't find '{CONFIG_NAME}' at '{name}' ({type(cause).__name__}); "
                "give the folder that save_pretrained wrote"
            ) from cause
        if not isinstance(values, dict):
            raise ArtifactError(
                f"expected a JSON object in {path}, got a {type(values).__name__}; save the prompt again"
            )
        return cls.from_dict(values)


@dataclass
class PromptLearningConfig(PeftConfig):
    """What every prompt has: its length and the width of the base's embeddings.

    ``num_transformer_submodules`` (S) is 1: the rows stand before the input of the
    (encoder's) embedding. PEFT's 2 for seq2seq adds rows that nothing ever reads.
    """

    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Virtual tokens (P)."})
    token_dim: int | None = field(default=None, metadata={"help": "Width of the embeddings (H)."})
    num_transformer_submodules: int | None = field(
        default=None, metadata={"help": "Submodules a prompt feeds (S)."}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads (A)."})
    num_layers: int | None = field(default=None, metadata={"help": "Transformer layers (L)."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save, such as a new head."}
    )

    keys_and_values: ClassVar[bool] = False
    """Whether the method trains keys and values of layers instead of virtual tokens of the input."""

    def model_types(self) -> tuple[str, ...]:
        """Return the parts of the base that get virtual tokens, as ``output_model_types`` names them.

        A model with one input has one part, ENCODER here. A seq2seq prompt with S = 2 feeds both.
        """
        if self.task_type != TaskType.SEQ_2_SEQ_LM:
            return ("ENCODER",)
        named: list[str] | None = getattr(self, "output_model_types", None)
        if named is not None:
            return tuple(named)
        return ("ENCODER", "DECODER") if self.num_transformer_submodules == 2 else ("ENCODER",)

    def prompt_of(self, values: Tensor) -> Prompt:
        """Return the prompt that values ``[S * P, H]``, or keys and values, are for this configuration."""
        from softprompt.prompts.prompt import Prompt  # configurations alone do not wait for torch

        if self.keys_and_values:
            return Prompt(prefix=values)
        types = self.model_types()
        parts = dict(
            zip(types, values.chunk(len(types)) if len(types) > 1 else [values], strict=True)
        )
        return Prompt(
            input=parts.get("ENCODER"),
            decoder=parts.get("DECODER"),
            placement=Placement(getattr(self, "placement", Placement.PREFIX)),
            sees_input=bool(getattr(self, "prompt_sees_input", True)),
        )

    def __post_init__(self) -> None:
        """Validate the length.

        Raises:
            ConfigError: If ``num_virtual_tokens`` is not a positive integer.
        """
        super().__post_init__()
        if self.num_virtual_tokens is not None:
            positive("num_virtual_tokens", self.num_virtual_tokens)


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (Lester et al. 2021): P rows trained directly, shape ``[P, H]``.

    ``tokenizer_kwargs`` go to ``AutoTokenizer.from_pretrained``; ``add_special_tokens=False``
    among them leaves the tokenizer's special tokens out of the text (PEFT keeps them).
    """

    method: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    """The method's name in PEFT, as long as no option is set that PEFT lacks."""
    inits: ClassVar[type[StrEnum]] = PromptTuningInit
    """What ``prompt_tuning_init`` may be."""
    native_model_types: ClassVar[tuple[list[str] | None, ...]] = (None, ["ENCODER"])
    """Values of ``output_model_types`` that mean the same in PEFT."""

    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.RANDOM, metadata={"help": "How the prompt starts."}
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "Text for TEXT; one label a line for LABELS."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer for TEXT and LABELS."}
    )
    tokenizer_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments of the tokenizer, with TEXT only."}
    )
    prompt_sees_input: bool = field(
        default=True,
        metadata={
            "help": "Whether an encoder's prompt attends to the input, as in PEFT.",
            "ours": True,
        },
    )
    output_model_types: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of a seq2seq model that get a prompt: ENCODER, DECODER.",
            "ours": True,
        },
    )
    placement: Placement | str = field(
        default=Placement.PREFIX,
        metadata={"help": "Where the prompt stands in the input.", "ours": True},
    )
    parameterization: Parameterization | str = field(
        default=Parameterization.DIRECT,
        metadata={"help": "What is trained for the rows.", "ours": True},
    )
    parameterization_rank: int | None = field(
        default=None, metadata={"help": "Rank r of low_rank and ulpt.", "ours": True}
    )
    prompt_tuning_init_prompt: str | None = field(
        default=None, metadata={"help": "Saved prompt to start from, for PROMPT.", "ours": True}
    )

    def __post_init__(self) -> None:
        """Validate the initialisation.

        Raises:
            ConfigError: For an unknown initialisation, or settings it lacks or would ignore.
        """
        super().__post_init__()
        self.placement = member(Placement, "placement", self.placement)
        self.parameterization = member(Parameterization, "parameterization", self.parameterization)
        self._check_parameterization()
        self._check_model_types()
        extended = self.peft_options() != {}
        self.peft_type = PeftType.EXTENDED_PROMPT_TUNING if extended else self.method
        self.prompt_tuning_init = member(self.inits, "prompt_tuning_init", self.prompt_tuning_init)
        self._check_text()
        self._check_prompt()

    def _check_prompt(self) -> None:
        init = self.prompt_tuning_init
        if init != PromptTuningInit.PROMPT:
            if self.prompt_tuning_init_prompt is not None:
                raise ConfigError(
                    f"prompt_tuning_init_prompt would be ignored with prompt_tuning_init='{init}'; "
                    "use PROMPT, or leave it out"
                )
            return
        # A saved prompt does not carry where it started from.
        if not self.prompt_tuning_init_prompt and not self.inference_mode:
            raise ConfigError(
                "When prompt_tuning_init='PROMPT', prompt_tuning_init_prompt can't be "
                f"{self.prompt_tuning_init_prompt}."
            )
        if self.parameterization is not Parameterization.DIRECT:
            raise ConfigError(
                f"prompt_tuning_init='PROMPT' starts from rows, which parameterization "
                f"{self.parameterization} cannot be given; use direct, or another initialisation"
            )

    def peft_options(self) -> dict[str, Any]:
        """Return the options set here that PEFT does not have; where there is one, it cannot load the prompt."""
        options: dict[str, Any] = {}
        if not self.prompt_sees_input:
            options["prompt_sees_input"] = False
        if self.output_model_types not in self.native_model_types and not self._has_one_input():
            options["output_model_types"] = list(self.output_model_types or ())
        if self.placement is not Placement.PREFIX:
            options["placement"] = str(self.placement)
        return options

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under PEFT's keys; ours are there only where they say something.

        What was trained in the place of the rows is no part of the artifact: it is baked.
        """
        return super().to_dict() | self.peft_options()

    def _has_one_input(self) -> bool:
        """Return whether the base has one part only; which one it is, the base knows."""
        return self.task_type not in (None, TaskType.SEQ_2_SEQ_LM)

    def _check_text(self) -> None:
        init = self.prompt_tuning_init
        if init in (PromptTuningInit.TEXT, PromptTuningInit.LABELS):
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                value = getattr(self, name)
                if value is None or (name == "tokenizer_name_or_path" and not value):
                    raise ConfigError(f"When prompt_tuning_init='{init}', {name} can't be {value}.")
        if self.tokenizer_kwargs and init != PromptTuningInit.TEXT:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")
        if (self.tokenizer_kwargs or {}).get("trust_remote_code"):
            raise ConfigError(
                "tokenizer_kwargs may not hold trust_remote_code: a saved prompt must not be able to run code"
            )

    def _check_parameterization(self) -> None:
        ranked = self.parameterization in (Parameterization.LOW_RANK, Parameterization.ULPT)
        rank = self.parameterization_rank
        if ranked:
            positive(f"parameterization_rank of {self.parameterization}", rank)
        elif rank is not None:
            raise ConfigError(
                f"parameterization_rank would be ignored with parameterization {self.parameterization}; "
                "leave it out, or use low_rank or ulpt"
            )

    def _check_model_types(self) -> None:
        if self.output_model_types is None:
            return
        if isinstance(self.output_model_types, str):
            raise ConfigError(
                f"output_model_types must be a list, such as ['{self.output_model_types}'], got "
                f"{self.output_model_types!r}"
            )
        given = [str(each) for each in self.output_model_types]
        allowed = [["ENCODER"], ["DECODER"], ["ENCODER", "DECODER"]]
        if sorted(given, reverse=True) not in allowed:
            raise ConfigError(
                f"output_model_types must be one of {', '.join(map(str, allowed))}, got {given}"
            )
        self.output_model_types = sorted(given, reverse=True)


_METHODS = ("multitask", "p_tuning", "prefix", "cpt")
"""Modules whose import registers a configuration class."""

_Config = TypeVar("_Config", bound=PeftConfig)


_classes: dict[str, type[PeftConfig]] = dict.fromkeys(
    (PeftType.PROMPT_TUNING, PeftType.EXTENDED_PROMPT_TUNING), PromptTuningConfig
)


def configures(peft_type: PeftType) -> Callable[[type[_Config]], type[_Config]]:
    """Return a decorator that makes a class the configuration of a method."""

    def register(owner: type[_Config]) -> type[_Config]:
        _classes[peft_type] = owner
        return owner

    return register


def _config_class(peft_type: str | None, default: type[PeftConfig]) -> type[PeftConfig]:
    """Return the class for a saved ``peft_type``; the asking class when none is named."""
    for method in _METHODS:
        importlib.import_module(f"softprompt.prompts.{method}")
    if peft_type is None:
        return default
    if peft_type not in _classes:
        raise ConfigError(
            f"peft_type must be one of {', '.join(_classes)}, got {peft_type!r}; "
            "this version trains and loads no other method"
        )
    return _classes[peft_type]
