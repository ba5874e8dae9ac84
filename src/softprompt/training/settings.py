"""What can be set for a training run: caikit's parameter names, each with its help text.

Source: caikit-nlp's "Prompt Tuning Parameters" for names, meaning and documented defaults; where
its document gives no default, the one here is explained in docs/training.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from softprompt.errors import ConfigError, nearest
from softprompt.fields import about, check, from_mapping, plain
from softprompt.training.tuning_config import TuningConfig

RATE_PER_RMS = 0.57
"""Default learning rate in units of the embedding's rms (measured, see docs/training.md)."""

TASK_RATE = 0.4
"""Default learning rate of task matrices, which are near one (after Wang et al. 2023)."""

DISTILLATION_WEIGHT = 0.9
"""Default weight of distillation against the likelihood."""

MULTITASK = "MULTITASK_PROMPT_TUNING"

_DATA, _PROMPT, _TASKS = "Data", "Prompt", "Several tasks"
_OPTIMISATION, _MODEL, _OUTPUT = "Optimisation", "Model and engine", "Output"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """Everything a run can be told besides its base model, its data and its output."""

    tuning_type: Literal["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"] = field(
        default="PROMPT_TUNING",
        metadata=about(
            "Method: one prompt, or a shared prompt times a low-rank matrix for each task.",
            group=_PROMPT,
        ),
    )
    tuning_config: TuningConfig = field(default_factory=TuningConfig)
    num_epochs: int = field(
        default=20,
        metadata=about("Number of training epochs.", least=1, group=_OPTIMISATION),
    )
    learning_rate: float | None = field(
        default=None,
        metadata=about(
            f"Peak learning rate; by default {RATE_PER_RMS} x the rms of the base model's embeddings.",
            above=0,
            most=1e6,
            group=_OPTIMISATION,
        ),
    )
    task_learning_rate: float | None = field(
        default=None,
        metadata=about(
            f"Peak learning rate of a multitask prompt's task matrices; by default {TASK_RATE}.",
            above=0,
            most=1e6,
            group=_TASKS,
        ),
    )
    task_sampling: Literal["proportional", "uniform"] | None = field(
        default=None,
        metadata=about(
            "Sampling of tasks: proportional to their records (the default), or uniform.",
            group=_TASKS,
        ),
    )
    distillation_weight: float | None = field(
        default=None,
        metadata=about(
            "Weight of distillation from a teacher prompt for each task; 0 trains no teachers.  By "
            f"default {DISTILLATION_WEIGHT}.",
            least=0,
            most=1e6,
            group=_TASKS,
        ),
    )
    accumulate_steps: int = field(
        default=1, metadata=about("Gradient accumulation steps.", least=1, group=_OPTIMISATION)
    )
    verbalizer: str = field(
        default="{{input}}",
        metadata=about("Template of the model's input, from a record's fields.", group=_DATA),
    )
    task_verbalizers: dict[str, str] | None = field(
        default=None,
        metadata=about("Templates of single tasks; the others use verbalizer.", group=_TASKS),
    )
    batch_size: int = field(
        default=8, metadata=about("Batch size, in records.", least=1, group=_OPTIMISATION)
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=about(
            "Maximum padded tokens of a forward pass; larger batches are split into micro-batches.",
            least=1,
            group=_MODEL,
        ),
    )
    max_source_length: int = field(
        default=256, metadata=about("Maximum input length, in tokens.", least=1, group=_DATA)
    )
    max_target_length: int = field(
        default=128, metadata=about("Maximum target length, in tokens.", least=1, group=_DATA)
    )
    task: Literal["classification", "generation"] | None = field(
        default=None,
        metadata=about("Kind of targets; by default inferred from the training data.", group=_DATA),
    )
    input_field: str | None = field(
        default=None, metadata=about("Column of the input text.", group=_DATA)
    )
    output_field: str | None = field(
        default=None, metadata=about("Column of the target.", group=_DATA)
    )
    source_prompt_base: str | None = field(
        default=None,
        metadata=about(
            "Folder of source prompts; by default the environment's SOURCE_PROMPT_BASE.",
            group=_TASKS,
        ),
    )
    torch_dtype: str | None = field(
        default=None,
        metadata=about("Data type of the base model; by default its own.", group=_MODEL),
    )
    device: str | None = field(
        default=None, metadata=about("Device, such as cpu or cuda:0.", group=_MODEL)
    )
    engine: Literal["auto", "forest", "expand", "plain"] = field(
        default="auto",
        metadata=about(
            "Engine of the forward passes: forest (packed, each prompt once), expand (the prompt's "
            "keys and values once), plain (padded), or auto (the fastest exact one).",
            group=_MODEL,
        ),
    )
    optimizer: Literal["adamw", "adafactor"] = field(
        default="adamw", metadata=about("Optimizer.", group=_OPTIMISATION)
    )
    weight_decay: float = field(
        default=0.0, metadata=about("Decoupled weight decay.", least=0, group=_OPTIMISATION)
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=about("Max gradient norm; 0 disables clipping.", least=0, group=_OPTIMISATION),
    )
    schedule: Literal["linear", "cosine", "constant"] = field(
        default="linear",
        metadata=about(
            "Learning-rate schedule after warmup, per optimizer step.", group=_OPTIMISATION
        ),
    )
    warmup_ratio: float = field(
        default=0.06,
        metadata=about(
            "Warmup, as a fraction of the optimizer steps.", least=0, most=1, group=_OPTIMISATION
        ),
    )
    keep_dropout: bool = field(
        default=False,
        metadata=about("Keep the base model's dropout active in training.", group=_OPTIMISATION),
    )
    keep_best: bool = field(
        default=True,
        metadata=about(
            "Keep the prompt of the best validation epoch instead of the last one.",
            group=_OPTIMISATION,
        ),
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=about("Early-stopping patience, in epochs.", least=1, group=_OPTIMISATION),
    )
    seed: int = field(
        default=73,
        metadata=about(
            "Random seed of the initial prompt and of shuffling.",
            least=0,
            most=2**32 - 1,
            group=_OPTIMISATION,
        ),
    )
    silence_progress_bars: bool = field(
        default=False, metadata=about("Show no progress bars.", group=_OUTPUT)
    )

    def __post_init__(self) -> None:
        """Refuse wrong values."""
        if isinstance(self.tuning_config, Mapping):
            object.__setattr__(
                self, "tuning_config", from_mapping(TuningConfig, self.tuning_config)
            )
        if isinstance(self.task_verbalizers, Mapping):
            object.__setattr__(self, "task_verbalizers", dict(self.task_verbalizers))
        check(self)
        if not self.multitask:
            self._check_single()
        else:
            self._check_multitask()
        if self.source_prompt_base is not None and not self.tuning_config.from_source:
            raise ConfigError(
                "source_prompt_base would be ignored: the prompt does not start from a source "
                "prompt; set prompt_tuning_init_method AVERAGE_SOURCE, or leave it out"
            )

    @property
    def multitask(self) -> bool:
        """Whether a shared prompt and task matrices are trained."""
        return self.tuning_type == MULTITASK

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
        for task in self.task_verbalizers or {}:
            if task not in tasks:
                raise ConfigError(
                    f"task_verbalizers names the task {task!r}{nearest(task, tasks)}; the data has "
                    f"{', '.join(tasks)}"
                )

    def _check_multitask(self) -> None:
        """Refuse what a multitask prompt cannot have."""
        tuning = self.tuning_config
        if tuning.parameterization != "direct":
            raise ConfigError(
                f"parameterization {tuning.parameterization} would be ignored with "
                f"tuning_type {MULTITASK}, which has its own; leave one of them out"
            )
        if tuning.prompt_tuning_init_method == "PROMPT":
            raise ConfigError(
                f"prompt_tuning_init_method PROMPT starts one task's rows, tuning_type {MULTITASK} has shared "
                "ones; start from a source prompt (ONLY_SOURCE_SHARED), or use PROMPT_TUNING"
            )
        for name, usual in (("placement", "prefix"), ("prompt_sees_input", True)):
            if getattr(tuning, name) != usual:
                raise ConfigError(
                    f"tuning_type {MULTITASK} has {name} {str(usual).lower()} only, as in PEFT, got "
                    f"{str(getattr(tuning, name)).lower()}; leave it out, or use PROMPT_TUNING"
                )

    def check_model_types(self, is_encoder_decoder: bool) -> None:
        """Refuse parts of the model that it, or the kind of prompt, does not have.

        Raises:
            ConfigError: the prompt would not go where the setting says.
        """
        tuning = self.tuning_config
        tuning.check_model_types(is_encoder_decoder)
        if self.multitask and is_encoder_decoder and tuning.output_model_types == ("DECODER",):
            raise ConfigError(
                f"tuning_type {MULTITASK} feeds the encoder of a seq2seq model, or both parts, as in PEFT, got "
                "output_model_types ['DECODER']; add ENCODER, or use PROMPT_TUNING"
            )

    def _check_single(self) -> None:
        """Refuse what only a multitask prompt has a use for."""
        tuning = self.tuning_config
        if tuning.from_source:
            raise ConfigError(
                f"prompt_tuning_init_method {tuning.prompt_tuning_init_method} needs tuning_type "
                f"{MULTITASK}; set it, or use RANDOM, TEXT, SAMPLE_VOCAB or LABELS"
            )
        unused = {
            "tuning_config.num_ranks": tuning.num_ranks,
            "task_learning_rate": self.task_learning_rate,
            "task_sampling": self.task_sampling,
            "distillation_weight": self.distillation_weight,
            "task_verbalizers": self.task_verbalizers,
        }
        for name, value in unused.items():
            if value is not None:
                raise ConfigError(
                    f"{name} would be ignored with tuning_type {self.tuning_type}; set tuning_type "
                    f"{MULTITASK}, or leave it out"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuneSettings:
        """Build settings from names and values; ``lr`` is another name of ``learning_rate``.

        Raises:
            ConfigError: an unknown name, a wrong value, or settings that contradict each other.
        """
        values = {name: _plain_value(value) for name, value in values.items()}
        if "lr" in values:
            if "learning_rate" in values:
                raise ConfigError("lr and learning_rate are the same setting; give one of them")
            values["learning_rate"] = values.pop("lr")
        for name in values.keys() & TuningConfig.__dataclass_fields__.keys():
            raise ConfigError(f"{name} belongs in tuning_config: tuning_config={{{name!r}: ...}}")
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set as plain values: `from_dict` of it gives equal settings."""
        return plain(self)


class TuneOptions(TypedDict, total=False):
    """Keyword arguments of `tune`, for type checkers: the fields of `TuneSettings` and ``lr``."""

    tuning_type: str
    tuning_config: TuningConfig | Mapping[str, Any]
    num_epochs: int
    learning_rate: float | None
    lr: float | None
    task_learning_rate: float | None
    task_sampling: str | None
    distillation_weight: float | None
    accumulate_steps: int
    verbalizer: str
    task_verbalizers: Mapping[str, str] | None
    batch_size: int
    max_tokens_per_batch: int | None
    max_source_length: int
    max_target_length: int
    task: str | None
    input_field: str | None
    output_field: str | None
    source_prompt_base: str | None
    torch_dtype: Any
    device: str | None
    engine: str
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    schedule: str
    warmup_ratio: float
    keep_dropout: bool
    keep_best: bool
    early_stopping_patience: int | None
    seed: int
    silence_progress_bars: bool


def _plain_value(value: Any) -> Any:
    """Return enum members by their value and ``torch.bfloat16`` as ``"bfloat16"``."""
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return getattr(value, "value", value)
