"""What the configurations of all methods have in common, under the names and defaults of PEFT.

A configuration knows its own JSON file (``adapter_config.json``), because saving and loading one by itself is part
of the contract; everything about weights lives in ``artifacts``. Construction validates and does no I/O. Each
method's own options are in ``methods/``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import secrets
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from softprompt.errors import ArtifactError, ConfigError, InterfaceError, line, nearest, no_folder
from softprompt.fields import check_number, setting
from softprompt.prompts.kinds import PeftType, Placement, TaskType
from softprompt.prompts.recognition import KnownToPeft
from softprompt.untrusted import MOST_TEXT_BYTES, check_types, parse_object, read_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from softprompt.prompts.module import PromptModule, Start
    from softprompt.prompts.prompt import Prompt

CONFIG_NAME = "adapter_config.json"
"""File name of a saved configuration, PEFT's."""

_CLASSES: Mapping[PeftType, tuple[str, str]] = {
    PeftType.PROMPT_TUNING: ("prompt_tuning", "PromptTuningConfig"),
    PeftType.EXTENDED_PROMPT_TUNING: ("prompt_tuning", "PromptTuningConfig"),
    PeftType.MULTITASK_PROMPT_TUNING: ("multitask", "MultitaskPromptTuningConfig"),
    PeftType.P_TUNING: ("p_tuning", "PromptEncoderConfig"),
    PeftType.PREFIX_TUNING: ("prefix", "PrefixTuningConfig"),
    PeftType.CARTRIDGE: ("cartridge", "CartridgeConfig"),
    PeftType.CPT: ("cpt", "CPTConfig"),
}
"""Module in ``methods`` and configuration class of each method; imported when they are needed."""

HUB_OPTIONS = frozenset({"revision", "cache_dir", "token", "local_files_only", "force_download", "etag_timeout"})
"""Options of a download that the Hub's client takes for one file and for a whole snapshot."""

_CODE = "trust_remote_code"
"""Option of tokenizers that lets a file run code; a user may set it, a saved prompt may not."""


def config_class(peft_type: str) -> type[PromptLearningConfig]:
    """Return the configuration class of a method, such as ``PREFIX_TUNING``.

    Raises:
        ConfigError: If there is no such method.
    """
    _check_method(peft_type)
    file, name = _CLASSES[PeftType(peft_type)]
    found: type[PromptLearningConfig] = getattr(importlib.import_module(f"softprompt.prompts.methods.{file}"), name)
    return found


@dataclass
class PeftConfig(KnownToPeft):
    """What every configuration has: the method, the task and the base model's name."""

    task_type: TaskType | str | None = setting(None, "Type of the task.")
    peft_type: PeftType | str | None = setting(None, "Method.")
    auto_mapping: dict[str, Any] | None = setting(None, "Base model class, for models without a task type.")
    peft_version: str | None = setting(None, "Version that wrote it.")
    base_model_name_or_path: str | None = setting(None, "Base model.")
    revision: str | None = setting(None, "Revision of the base model.")
    inference_mode: bool = setting(False, "Load frozen, for inference.")

    method: ClassVar[PeftType | None] = None
    """The method's name in PEFT; None where ``peft_type`` names it."""
    came_in_a_file = False  # no annotation, so that it is no field

    def __post_init__(self) -> None:
        """Validate the enumerations, and spell paths as the text that a file holds.

        Raises:
            ConfigError: For a task type or method that does not exist.
        """
        for name, value in vars(self).items():
            if isinstance(value, Path):
                setattr(self, name, str(value))
        if self.task_type is not None:
            known = ", ".join(TaskType)
            if self.task_type not in list(TaskType):
                raise ConfigError(
                    f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {known}."
                )
            self.task_type = TaskType(self.task_type)
        # A class of one method has that method, whatever is given, as in PEFT.
        if self.method is None and self.peft_type is not None:
            _check_method(self.peft_type)
            self.peft_type = PeftType(self.peft_type)

    @property
    def is_prompt_learning(self) -> bool:
        """True: every configuration here trains a prompt."""
        return True

    @property
    def is_adaption_prompt(self) -> bool:
        """False: no configuration here is one of adaption prompts."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, under PEFT's keys; fields marked ``ours`` are left out.

        So is ``trust_remote_code``, which no file may set.
        """
        ours = {f.name for f in dataclasses.fields(self) if f.metadata.get("ours")}
        values = {
            key: str(value) if isinstance(value, StrEnum) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in ours
        }
        return _without_code(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build the configuration that ``peft_type`` names from a user's plain values, strictly.

        Raises:
            ConfigError: For an unknown method, or an unknown key that is set.
        """
        config = cls._made(cls.check_kwargs(**_trusted(values)), strict=True)
        if not isinstance(config, cls):
            raise ConfigError(f"expected a {cls.__name__}, the values are of a {type(config).__name__}")
        return config

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> PeftConfig:
        """Build the configuration that ``peft_type`` names from the values of a file; see ``from_peft_type``.

        Raises:
            ConfigError: For an unknown method, a bad value, or a file that asks to run a tokenizer's code.
        """
        check_types(cls._named(values), values, CONFIG_NAME, ConfigError)
        return cls._made(cls.check_kwargs(**_trusted(values)), strict=False)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the configuration that ``peft_type`` names; keys that it lacks are left out, with a warning.

        Files of newer PEFT versions carry them; those that are not set are left out in silence.

        Raises:
            ConfigError: For an unknown method, or a bad value.
            InterfaceError: If there are unknown keys and no ``peft_type``: these are no such values.
        """
        return cls._made(kwargs, strict=False)

    @classmethod
    def _made(cls, values: Mapping[str, Any], *, strict: bool) -> PeftConfig:
        """Build the configuration that values are of; unknown keys that are set are refused, or left out."""
        target = cls._named(values)
        known = {f.name for f in dataclasses.fields(target)}
        unknown = sorted(key for key in values if key not in known and values[key] not in (None, False, {}, [], ""))
        for key in unknown if strict else ():
            raise ConfigError(
                f"{target.__name__} has no option {key!r}{nearest(key, known)}, and it is set to {values[key]!r}; "
                "remove it from the configuration, or upgrade softprompt"
            )
        if unknown and "peft_type" not in values:
            raise InterfaceError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {line(repr(unknown))} for class {target.__name__}, these are "
                "ignored. A newer version has probably written them; upgrade if the prompt does not behave as it "
                "should.",
                stacklevel=3,
            )
        return target(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def _named(cls, values: Mapping[str, Any]) -> type[PeftConfig]:
        return cls if (named := values.get("peft_type")) is None else config_class(named)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Return the values of a file before they are used; a subclass may change them, as in PEFT."""
        return kwargs

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """Return the values of a configuration's file, without what only holds while PEFT runs.

        Raises:
            ArtifactError: If it holds no JSON object.
        """
        data = read_bytes(Path(path_json_file), MOST_TEXT_BYTES)
        values = parse_object(data.decode(errors="replace"), str(path_json_file))
        if values.pop("runtime_config", None) is not None:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime configurations "
                "are only valid at runtime.",
                stacklevel=2,
            )
        return values

    def save_pretrained(
        self, save_directory: str | Path, *, auto_mapping_dict: dict[str, Any] | None = None
    ) -> None:
        """Write ``adapter_config.json`` into a directory, made if needed; a given ``auto_mapping_dict`` too.

        Raises:
            ConfigError: If the path is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ConfigError(f"Provided path ({directory}) should be a directory, not a file")
        directory.mkdir(parents=True, exist_ok=True)
        values = self.to_dict() | ({"auto_mapping": auto_mapping_dict} if auto_mapping_dict else {})
        temporary = directory / f".{CONFIG_NAME}.{secrets.token_hex(4)}.tmp"  # no link that came waits there
        temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(directory / CONFIG_NAME)

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, **options: Any) -> str:
        """Save the configuration alone into a Hub repository, made if needed, and return the commit's address.

        ``options`` are ``private``, and those of ``HfApi.upload_folder``, such as ``commit_message``.

        Raises:
            ArtifactError: If the Hub refuses or cannot be reached.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                name = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
                return str(api.upload_folder(repo_id=name, folder_path=folder, **options).commit_url)
            except Exception as cause:  # the client raises errors of its HTTP library too
                raise ArtifactError(
                    f"could not upload to {repo_id} ({' '.join(str(cause).split())[:160]}); check the name, the "
                    "connection and `hf auth login`"
                ) from cause

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """Read the configuration from a folder or a Hub repository; its class is what the file says.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            subfolder: Folder inside it.
            **kwargs: Options of the download (``revision``, ``cache_dir``, ``token`` ...), and values of
                options that the file does not have.

        Raises:
            ArtifactError: If there is no readable ``adapter_config.json``.
            ConfigError: If its values are not valid.
        """
        from huggingface_hub import hf_hub_download  # `softprompt --help` does not wait for it

        name = str(pretrained_model_name_or_path)
        path = Path(name, subfolder or "", CONFIG_NAME)
        try:
            if not path.is_file():
                if kwargs.get("revision") is None and (misspelt := no_folder(name, before_hub=True)):
                    raise ArtifactError(f"Can't find '{CONFIG_NAME}' at '{name}': {misspelt}")
                hub = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
                path = Path(hf_hub_download(name, CONFIG_NAME, subfolder=subfolder, **hub))
            values = cls.from_json_file(path)
        except ArtifactError:
            raise
        except Exception as cause:
            raise ArtifactError(
                f"Can't find '{CONFIG_NAME}' at '{name}' ({no_folder(name) or type(cause).__name__}); "
                "give the folder that save_pretrained wrote"
            ) from cause
        known = {f.name for f in dataclasses.fields(cls._named(values))} - HUB_OPTIONS
        given = {key: value for key, value in kwargs.items() if key in known}
        config = cls.from_file(given | values)
        config.came_in_a_file = True
        if not isinstance(config, cls):
            warnings.warn(
                line(f"{name} holds a {type(config).__name__}, not a {cls.__name__}; that is what it is loaded as"),
                stacklevel=2,
            )
        return cast(Self, config)


@dataclass
class PromptLearningConfig(PeftConfig):
    """What every prompt has: its length and the width of the base's embeddings.

    ``num_transformer_submodules`` (S) is 1: the prompt stands before the input of the
    (encoder's) embedding. PEFT's 2 for seq2seq adds virtual tokens that nothing ever reads.
    """

    num_virtual_tokens: int | None = setting(None, "Virtual tokens (P).")
    token_dim: int | None = setting(None, "Width of the embeddings (H).")
    num_transformer_submodules: int | None = setting(None, "Submodules a prompt feeds (S).")
    num_attention_heads: int | None = setting(None, "Attention heads (A).")
    num_layers: int | None = setting(None, "Transformer layers (L).")
    modules_to_save: list[str] | None = setting(None, "Further modules to train and save, such as a new head.")

    keys_and_values: ClassVar[bool] = False
    """Whether the method trains keys and values of layers instead of virtual tokens of the input."""

    def refuse_ignored(self) -> None:
        """Raise ConfigError for options that would be ignored; ``tune`` asks, PEFT's interface takes them."""

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return this method's untrained module.

        Raises:
            ConfigError: If no method belongs to the configuration, or it lacks something.
        """
        raise ConfigError(f"expected the configuration of a prompt, got a {type(self).__name__}")

    def table_size(self, width: int) -> tuple[int, int]:
        """Return the virtual tokens S·P and width H of the prompt before embeddings that are ``width`` wide.

        Raises:
            ConfigError: If the length is missing, or ``token_dim`` is another width.
        """
        if self.num_virtual_tokens is None:
            raise ConfigError("num_virtual_tokens is missing; give the length of the prompt, such as 20")
        if self.token_dim not in (None, width):
            raise ConfigError(
                f"token_dim is {self.token_dim}, but the base's embeddings are {width} wide; leave it out"
            )
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1), width

    def model_types(self) -> tuple[str, ...]:
        """Return the parts of the base that get virtual tokens, as ``output_model_types`` names them.

        A model with one input has one part, ENCODER here. A seq2seq prompt with S = 2 feeds both.
        """
        if self.task_type != TaskType.SEQ_2_SEQ_LM:
            return ("ENCODER",)
        if (named := getattr(self, "output_model_types", None)) is not None:
            return tuple(named)
        return ("ENCODER", "DECODER") if self.num_transformer_submodules == 2 else ("ENCODER",)

    def prompt_of(self, values: Tensor) -> Prompt:
        """Return the prompt that values ``[S·P, H]``, or keys and values, are for this configuration."""
        from softprompt.prompts.prompt import Prompt  # configurations alone do not wait for torch

        if self.keys_and_values:
            return Prompt(prefix=values)
        types = self.model_types()
        parts = dict(zip(types, values.chunk(len(types)) if len(types) > 1 else [values], strict=True))
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
            check_number("num_virtual_tokens", int, self.num_virtual_tokens, least=1)


def _trusted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file, refused where they ask to run a tokenizer's code."""
    safe = _without_code(values)
    if not values.get("inference_mode") and values != safe:
        raise ConfigError(
            "tokenizer_kwargs of a file may not hold trust_remote_code: a saved prompt must not be able to "
            "run code; remove it there, and give it in Python if you trust the tokenizer"
        )
    return safe


def _without_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration without the option that runs a tokenizer's code."""
    given = values.get("tokenizer_kwargs")
    if not isinstance(given, dict) or _CODE not in given:
        return dict(values)
    return {**values, "tokenizer_kwargs": {key: value for key, value in given.items() if key != _CODE}}


def _check_method(peft_type: str) -> None:
    if peft_type not in list(PeftType):
        raise ConfigError(
            f"peft_type must be one of {', '.join(PeftType)}, got {peft_type!r}; "
            "this version trains and loads no other method"
        )
