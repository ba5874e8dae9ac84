"""The configurations users write, under the names and defaults of PEFT.

A configuration knows its own JSON file (``adapter_config.json``), because saving and
loading one by itself is part of the contract; everything about weights lives in
``artifacts``. Construction validates and does no I/O.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download

from softprompt.errors import ArtifactError, ConfigError, nearest

CONFIG_NAME = "adapter_config.json"
"""File name of a saved configuration, PEFT's."""


class TaskType(StrEnum):
    """What the base model is for; PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The methods of prompt learning this library trains; PEFT's names."""

    PROMPT_TUNING = "PROMPT_TUNING"
    ISOLATED_PROMPT_TUNING = "ISOLATED_PROMPT_TUNING"
    """Ours: an encoder's prompt that does not see the input. PEFT refuses the name, as it must:
    it would run another model."""


class PromptTuningInit(StrEnum):
    """Where the first values of a soft prompt come from.

    ``RANDOM``, ``TEXT`` and ``SAMPLE_VOCAB`` mean what they mean in PEFT. ``RANDOM`` is
    N(0, 1), 50 to 100 times outside the embedding scale of a Llama; ``RANDOM_SCALED`` is
    the same draw times the rms of the base's embeddings. ``LABELS`` starts each row at a
    class label (the mean of its sub-tokens, Lester et al. 2021), the rest from the vocabulary.
    """

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"
    RANDOM_SCALED = "RANDOM_SCALED"
    LABELS = "LABELS"


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
        """Return the fields as plain JSON values, under PEFT's keys."""
        return {
            key: str(value) if isinstance(value, StrEnum) else value
            for key, value in dataclasses.asdict(self).items()
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

    def __post_init__(self) -> None:
        """Validate the length.

        Raises:
            ConfigError: If ``num_virtual_tokens`` is not a positive integer.
        """
        super().__post_init__()
        count = self.num_virtual_tokens
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise ConfigError(f"num_virtual_tokens must be a positive integer, got {count!r}")


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (Lester et al. 2021): P rows trained directly, shape ``[P, H]``.

    ``tokenizer_kwargs`` go to ``AutoTokenizer.from_pretrained``; ``add_special_tokens=False``
    among them leaves the tokenizer's special tokens out of the text (PEFT keeps them).
    """

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
        metadata={"help": "Whether an encoder's prompt attends to the input, as in PEFT."},
    )

    def __post_init__(self) -> None:
        """Validate the initialisation.

        Raises:
            ConfigError: For an unknown initialisation, or settings it lacks or would ignore.
        """
        super().__post_init__()
        if self.peft_type is PeftType.ISOLATED_PROMPT_TUNING:
            self.prompt_sees_input = False
        kinds = (PeftType.ISOLATED_PROMPT_TUNING, PeftType.PROMPT_TUNING)
        self.peft_type = kinds[bool(self.prompt_sees_input)]
        if self.prompt_tuning_init not in list(PromptTuningInit):
            raise ConfigError(
                f"prompt_tuning_init must be one of {', '.join(PromptTuningInit)}, got "
                f"{self.prompt_tuning_init!r}{nearest(str(self.prompt_tuning_init), PromptTuningInit)}"
            )
        init = self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        if init in (PromptTuningInit.TEXT, PromptTuningInit.LABELS):
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                value = getattr(self, name)
                if value is None or (name == "tokenizer_name_or_path" and not value):
                    raise ConfigError(
                        f"When prompt_tuning_init='{init.value}', {name} can't be {value}."
                    )
        if self.tokenizer_kwargs and init is not PromptTuningInit.TEXT:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")
        if (self.tokenizer_kwargs or {}).get("trust_remote_code"):
            raise ConfigError(
                "tokenizer_kwargs may not hold trust_remote_code: a saved prompt must not be able to run code"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under PEFT's keys; ``peft_type`` says whether the prompt sees the input."""
        values = PromptLearningConfig.to_dict(self)
        del values["prompt_sees_input"]
        return values


def _config_class(peft_type: str | None, default: type[PeftConfig]) -> type[PeftConfig]:
    """Return the class for a saved ``peft_type``; the asking class when none is named."""
    if peft_type is None:
        return default
    classes: dict[str, type[PeftConfig]] = dict.fromkeys(PeftType, PromptTuningConfig)
    if peft_type not in classes:
        raise ConfigError(
            f"peft_type must be one of {', '.join(classes)}, got {peft_type!r}; "
            "this version trains and loads no other method"
        )
    return classes[peft_type]
