"""What can be set for a training run: caikit's parameter names, each with its help text.

Source: caikit-nlp's "Prompt Tuning Parameters" for names, meaning and documented defaults; where
its document gives no default, the one here is explained in docs/training.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from softprompt.data import names_of_labels
from softprompt.errors import ConfigError, nearest
from softprompt.fields import check, from_mapping, plain, setting
from softprompt.prompts import PromptLearningConfig
from softprompt.training.configuration import (
    CPT,
    METHODS,
    MULTITASK,
    Origins,
    config_from,
    configuration_of,
    has_setting,
    plain_config,
    tuning_type_of,
)
from softprompt.training.keywords import full_names, tracker_names
from softprompt.training.tuning_config import TuningConfig

AUTO_RATE = "auto"
"""The learning rate that a probe finds; see ``rate_probe``."""

RATE_PER_RMS = 0.57
"""Default learning rate in units of the embedding's rms (measured, see docs/training.md)."""

KEY_VALUE_RATE_PER_RMS = 0.2
"""Default learning rate of keys and values in units of their own rms in each layer (likewise)."""

FEW_LAYERS = 4
"""Layers up to which that is their rate."""

FALL_BY_LAYERS = 1.3
"""Power of the number of layers with which it falls on more, where what the layers change adds up (likewise)."""

NETWORK_RATE = 0.003
"""Default learning rate of the networks of P-tuning and of prefix projections (likewise)."""

CONTEXT_RATE = 0.1
"""Default learning rate of a context, in units of what its numbers may move by."""

TASK_RATE = 0.4
"""Default learning rate of task matrices, which are near one (after Wang et al. 2023)."""

DISTILLATION_WEIGHT = 0.9
"""Default weight of distillation against the likelihood."""

CONTEXT_RECORDS = 4
"""Default number of training records in the context of context-aware prompt tuning."""

TuningType = Literal["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"]

_KEYS_AND_VALUES = (METHODS["prefix"], METHODS["cartridge"])
_ONLY_WITH: Mapping[str, tuple[str, ...]] = {
    "task_learning_rate": (MULTITASK,),
    "task_sampling": (MULTITASK,),
    "distillation_weight": (MULTITASK,),
    "task_verbalizers": (MULTITASK,),
    "init_from_records": _KEYS_AND_VALUES,
    "demonstrations": _KEYS_AND_VALUES,
    "leave_one_out": _KEYS_AND_VALUES,
    "token_dropout": _KEYS_AND_VALUES,
    "context_records": (CPT,),
}
"""Settings that mean something with some methods only."""

_DATA, _PROMPT, _TASKS = "Data", "Prompt", "Several tasks"
_OPTIMISATION, _MODEL, _OUTPUT = "Optimisation", "Model and engine", "Output"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """The settings of a run: all but its base model, its data and its output.

    What the prompt is, is said by ``config``, or by ``tuning_type`` and ``tuning_config``.
    """

    tuning_type: TuningType = setting(
        "PROMPT_TUNING", "Method, under caikit's and PEFT's name; see --method.", group=_PROMPT
    )
    tuning_config: TuningConfig = field(default_factory=TuningConfig)
    config: PromptLearningConfig | None = setting(
        None, "Configuration of the method, instead of tuning_type and tuning_config."
    )
    num_epochs: int = setting(20, "Number of training epochs.", least=1, group=_OPTIMISATION)
    max_steps: int | None = setting(
        None, "Optimizer steps in total, instead of num_epochs.", least=1, group=_OPTIMISATION
    )
    learning_rate: float | str | None = setting(
        None,
        f"Peak learning rate, or {AUTO_RATE}: a few are tried side by side, and the best is taken; by default "
        f"{RATE_PER_RMS} x the rms of the base model's embeddings, for keys and values {KEY_VALUE_RATE_PER_RMS} x "
        f"theirs (of more than {FEW_LAYERS} layers times ({FEW_LAYERS} / layers)^{FALL_BY_LAYERS}), "
        f"for networks {NETWORK_RATE}, for a context {CONTEXT_RATE} x what it may move by.",
        above=0,
        most=1e6,
        word=AUTO_RATE,
        group=_OPTIMISATION,
    )
    task_learning_rate: float | None = setting(
        None,
        f"Peak learning rate of a multitask prompt's task matrices; by default {TASK_RATE}.",
        above=0,
        most=1e6,
        group=_TASKS,
    )
    task_sampling: Literal["proportional", "uniform"] | None = setting(
        None, "Sampling of tasks: proportional to their records (the default), or uniform.", group=_TASKS
    )
    distillation_weight: float | None = setting(
        None,
        "Weight of distillation from a teacher prompt for each task; 0 trains no teachers.  By "
        f"default {DISTILLATION_WEIGHT}.",
        least=0,
        most=1e6,
        group=_TASKS,
    )
    init_from_records: bool = setting(
        True,
        "Start keys and values that have no other start at those of the first training records.",
        group="Prefix tuning",
    )
    demonstrations: int | None = setting(
        None,
        "Start keys and values at those of this many training records in full, as many of each label, and make the "
        "prompt as long as they are.",
        least=1,
        group="Prefix tuning",
    )
    leave_one_out: bool = setting(
        True, "Hide from a demonstration, while it is trained on, its own virtual tokens.", group="Prefix tuning"
    )
    token_dropout: float = setting(
        0.0,
        "Share of the virtual tokens, but for the first, that each update leaves out, such as 0.05.",
        least=0,
        most=0.9,
        group="Prefix tuning",
    )
    context_records: int | None = setting(
        None,
        f"Training records in the context, the first ones; by default {CONTEXT_RECORDS}.",
        least=1,
        group="Context-aware prompt tuning",
    )
    accumulate_steps: int = setting(1, "Gradient accumulation steps.", least=1, group=_OPTIMISATION)
    verbalizer: str = setting("{{input}}", "Template of the model's input, from a record's fields.", group=_DATA)
    task_verbalizers: dict[str, str] | None = setting(
        None, "Templates of single tasks; the others use verbalizer.", group=_TASKS
    )
    batch_size: int = setting(8, "Batch size, in records.", least=1, group=_OPTIMISATION)
    max_tokens_per_batch: int | None = setting(
        None,
        "Maximum padded tokens of a forward pass; larger batches are split into micro-batches.",
        least=1,
        group=_MODEL,
    )
    max_source_length: int = setting(256, "Maximum input length, in tokens.", least=1, group=_DATA)
    max_target_length: int = setting(128, "Maximum target length, in tokens.", least=1, group=_DATA)
    task: Literal["classification", "generation"] | None = setting(
        None, "Kind of targets; by default inferred from the training data.", group=_DATA
    )
    train_on: Literal["last", "all"] | None = setting(
        None, "Answers of a chat that are trained: the last (the default), or all.", group=_DATA
    )
    input_field: str | None = setting(None, "Column of the input text.", group=_DATA)
    output_field: str | None = setting(None, "Column of the target.", group=_DATA)
    label_names: dict[str, str] | None = setting(None, "Names of targets that are numbers.", group=_DATA)
    validation_split: float | None = setting(
        None,
        "Share of the training data to validate on instead, the same of each label; without --validation-data.",
        above=0,
        most=0.9,
        group=_DATA,
    )
    limit: int | None = setting(None, "Train on the first records only.", least=1, group=_DATA)
    source_prompt_base: str | None = setting(
        None, "Folder of source prompts; by default the environment's SOURCE_PROMPT_BASE.", group=_TASKS
    )
    torch_dtype: str | None = setting(None, "Data type of the base model; by default its own.", group=_MODEL)
    device: str | None = setting(None, "Device, such as cpu or cuda:0.", group=_MODEL)
    shard: Literal["fsdp", "tp"] | None = setting(
        None,
        "Spread a base larger than one device over torchrun's processes: fsdp (its layers, gathered when they run) "
        "or tp (the inside of each layer).",
        group=_MODEL,
    )
    engine: Literal["auto", "forest", "expand", "plain"] = setting(
        "auto",
        "Engine of the forward passes: forest (packed, each prompt once), expand (the prompt's "
        "keys and values once), plain (padded), or auto (the fastest exact one).",
        group=_MODEL,
    )
    optimizer: Literal["adamw", "adafactor"] = setting("adamw", "Optimizer.", group=_OPTIMISATION)
    weight_decay: float = setting(0.0, "Decoupled weight decay.", least=0, group=_OPTIMISATION)
    max_grad_norm: float = setting(1.0, "Max gradient norm; 0 disables clipping.", least=0, group=_OPTIMISATION)
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", "Learning-rate schedule after warmup, per optimizer step.", group=_OPTIMISATION
    )
    warmup_ratio: float = setting(
        0.06, "Warmup, as a fraction of the optimizer steps.", least=0, most=1, group=_OPTIMISATION
    )
    choice_weight: float | None = setting(
        None,
        "Weight of the choice among the labels against their likelihood; by default 1 where the targets of one "
        "data set are labels; 0 trains the likelihood alone, as PEFT does.",
        least=0,
        most=1e6,
        group=_OPTIMISATION,
    )
    keep_dropout: bool = setting(False, "Keep the base model's dropout active in training.", group=_OPTIMISATION)
    keep_best: bool = setting(
        True, "Keep the prompt of the best validation epoch instead of the last one.", group=_OPTIMISATION
    )
    early_stopping_patience: int | None = setting(
        None, "Early-stopping patience, in epochs.", least=1, group=_OPTIMISATION
    )
    seed: int = setting(
        73, "Random seed of the initial prompt and of shuffling.", least=0, most=2**32 - 1, group=_OPTIMISATION
    )
    seeds: int = setting(
        1,
        "Prompts to train side by side, from the seeds seed, seed + 1 ...; the best is kept.",
        least=1,
        group=_OPTIMISATION,
    )
    restarts: int = setting(
        0,
        "Times to start again with the next seed, where the prompt learnt nothing; the best is kept.",
        least=0,
        group=_OPTIMISATION,
    )
    save_every: int | None = setting(
        None, "Save the resume state every so many steps; by default every 30 seconds.", least=1, group=_OUTPUT
    )
    track: tuple[str, ...] | None = setting(
        None, "Tracker of the run: tensorboard, mlflow, wandb or trackio; or several, with commas.", group=_OUTPUT
    )
    silence_progress_bars: bool = setting(False, "Show no progress bars.", group=_OUTPUT)

    def __post_init__(self) -> None:
        """Refuse wrong values, and settings of which one would be ignored; no base is needed for it."""
        self._normalise()
        check(self)
        self._check_config()
        for item in dataclasses.fields(self):
            methods = _ONLY_WITH.get(item.name, ())
            changed = getattr(self, item.name) != item.default
            if methods and changed and self.tuning_type not in methods:
                raise ConfigError(
                    f"{item.name} would be ignored with tuning_type {self.tuning_type}; set tuning_type "
                    f"{' or '.join(methods)}, or leave it out"
                )
        if self.seeds > 1 and self.restarts:
            raise ConfigError("restarts would be ignored with several seeds, which start at once; give one of them")
        if self.demonstrations is None and not self.leave_one_out:
            raise ConfigError("leave_one_out would be ignored without demonstrations; give their number")
        if self.demonstrations is not None and "num_virtual_tokens" in self.tuning_config.given():
            raise ConfigError("num_virtual_tokens would be ignored: the prompt is as long as its demonstrations")
        if self.train_on == "all" and self.task == "classification":
            raise ConfigError("train_on all trains every answer, and the label of a chat is its last; leave it out")
        if self.source_prompt_base is not None and not self.tuning_config.from_source:
            raise ConfigError(
                "source_prompt_base would be ignored: the prompt does not start from a source "
                "prompt; set prompt_tuning_init_method AVERAGE_SOURCE, or leave it out"
            )
        self.configuration(Origins())

    def configuration(self, origins: Origins) -> PromptLearningConfig:
        """Return the configuration of the prompt, its sizes not filled in yet.

        Raises:
            ConfigError: It refuses a value, or the method does not have a setting.
        """
        if self.config is None:
            return configuration_of(self.tuning_config, self.tuning_type, origins)
        return dataclasses.replace(self.config)

    @property
    def starts_from_a_method(self) -> bool:
        """Whether ``prompt_tuning_init_method`` says what the prompt starts from."""
        return self.config is None and has_setting(self.tuning_type, "prompt_tuning_init_method")

    @property
    def multitask(self) -> bool:
        """Whether a shared prompt and task matrices are trained."""
        return self.tuning_type == MULTITASK

    def _normalise(self) -> None:
        """Make objects of mappings, and let a configuration say the method."""
        if isinstance(self.tuning_config, Mapping):
            object.__setattr__(self, "tuning_config", from_mapping(TuningConfig, self.tuning_config))
        if isinstance(self.task_verbalizers, Mapping):
            object.__setattr__(self, "task_verbalizers", dict(self.task_verbalizers))
        if self.label_names is not None:
            object.__setattr__(self, "label_names", names_of_labels(self.label_names))
        if self.track is not None:
            object.__setattr__(self, "track", tracker_names(self.track))
        if self.train_on == "all" and self.task is None:
            object.__setattr__(self, "task", "generation")
        if isinstance(self.config, Mapping):
            object.__setattr__(self, "config", config_from(self.config, self.tuning_type))

    def _check_config(self) -> None:
        """Refuse a configuration that something else contradicts.

        Raises:
            ConfigError: ``tuning_type`` or ``tuning_config`` say something else, or it is not for training.
        """
        config = self.config
        if config is None:
            return
        own = tuning_type_of(config)
        if self.tuning_type not in (own, METHODS["prompt_tuning"]):
            raise ConfigError(f"config is of {own}, tuning_type says {self.tuning_type}; leave tuning_type out")
        if self.tuning_config != TuningConfig():
            raise ConfigError("config and tuning_config both say what the prompt is; give one of them")
        if config.inference_mode or config.modules_to_save:
            name = "inference_mode" if config.inference_mode else "modules_to_save"
            raise ConfigError(f"tune trains the prompt and nothing else; leave {name} out of config")
        object.__setattr__(self, "tuning_type", own)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Refuse settings that do not fit the data sets.

        Args:
            tasks: Names of the tasks; none for a single data set without a name.

        Raises:
            ConfigError: a setting would be ignored, or a task does not exist.
        """
        if tasks and not self.multitask:
            raise ConfigError(
                f"data sets with task names ({', '.join(tasks)}) need tuning_type {MULTITASK}; set "
                "it, or give one data set without a name"
            )
        if len(tasks) < 2:
            for name in ("task_sampling", "distillation_weight", "task_verbalizers"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} would be ignored with one data set; give several as "
                        "{task: data}, or leave it out"
                    )
        elif self.label_names is not None:
            raise ConfigError("label_names would rename the targets of every task; name them in the data")
        for task in self.task_verbalizers or {}:
            if task not in tasks:
                raise ConfigError(
                    f"task_verbalizers names the task {task!r}{nearest(task, tasks)}; the data has "
                    f"{', '.join(tasks)}"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuneSettings:
        """Build settings from names and values; see ``full_names``.

        Raises:
            ConfigError: an unknown name, a wrong value, or settings that contradict each other.
        """
        values = {name: _plain_value(value) for name, value in full_names(values).items()}
        for name in values.keys() & TuningConfig.__dataclass_fields__.keys():
            raise ConfigError(f"{name} belongs in tuning_config: tuning_config={{{name!r}: ...}}")
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set as plain values: `from_dict` of it gives equal settings."""
        values = plain(self)
        if self.config is not None:
            del values["tuning_config"]
            values["config"] = plain_config(self.config)
        return values


def _plain_value(value: Any) -> Any:
    """Return enum members by their value and ``torch.bfloat16`` as ``"bfloat16"``."""
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return getattr(value, "value", value)
