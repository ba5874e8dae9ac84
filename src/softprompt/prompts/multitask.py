"""The configuration of multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from softprompt.errors import ConfigError
from softprompt.prompts.configs import PromptTuningConfig, configures
from softprompt.prompts.fields import member, positive
from softprompt.prompts.kinds import (
    MultitaskPromptTuningInit,
    Parameterization,
    PeftType,
    TaskMatrixInit,
)

BOTH = ["ENCODER", "DECODER"]
SOURCE_INITS = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)
"""Initialisations that read a source prompt."""

_DOCUMENTED = {"AVERAGE_SOURCE": MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS}
"""caikit's document spells the member so; its code wants PEFT's name."""


@configures(PeftType.MULTITASK_PROMPT_TUNING)
@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """A prompt shared by K tasks; each multiplies it with a matrix of rank R of its own.

    A seq2seq prompt feeds the encoder and the decoder (S = 2), as in PEFT, whose default that is;
    ``output_model_types=["ENCODER"]``, or ``num_transformer_submodules=1``, leaves the decoder out.

    Under ``inference_mode`` no source is read or asked for: a finished prompt needs none.
    """

    method: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING
    inits: ClassVar[type[StrEnum]] = MultitaskPromptTuningInit
    native_model_types: ClassVar[tuple[list[str] | None, ...]] = (None, ["ENCODER"], BOTH)

    prompt_tuning_init: MultitaskPromptTuningInit | str = field(
        default=MultitaskPromptTuningInit.RANDOM, metadata={"help": "How the prompt starts."}
    )
    prompt_tuning_init_state_dict_path: str | None = field(
        default=None, metadata={"help": "Weights file of the source prompt."}
    )
    prompt_tuning_init_task: int | None = field(
        default=0, metadata={"help": "Task of the source, for EXACT_SOURCE_TASK."}
    )
    num_ranks: int | None = field(default=1, metadata={"help": "Rank of the task matrices (R)."})
    num_tasks: int | None = field(default=1, metadata={"help": "Tasks (K)."})
    task_matrix_init: TaskMatrixInit | str = field(
        default=TaskMatrixInit.ONES,
        metadata={"help": "How the task matrices start.", "ours": True},
    )

    def __post_init__(self) -> None:
        """Validate what is multitask's own.

        Raises:
            ConfigError: For settings that do not exist, are missing, or would be ignored.
        """
        given = str(self.prompt_tuning_init)
        self.prompt_tuning_init = _DOCUMENTED.get(given, self.prompt_tuning_init)
        super().__post_init__()
        self.task_matrix_init = member(TaskMatrixInit, "task_matrix_init", self.task_matrix_init)
        positive("num_ranks", self.num_ranks)
        positive("num_tasks", self.num_tasks)
        positive("prompt_tuning_init_task", self.prompt_tuning_init_task, least=0)
        self._refuse_options()
        self._count_submodules()
        if not self.inference_mode:
            self._check_source()

    def _refuse_options(self) -> None:
        options = self.peft_options()
        if options:
            raise ConfigError(
                "multitask prompts stand before the encoder's or the decoder-only model's input, or before "
                f"encoder and decoder, as in PEFT; leave out {', '.join(options)}, or use PROMPT_TUNING"
            )
        if self.parameterization != Parameterization.DIRECT:
            raise ConfigError(
                f"parameterization {self.parameterization} is for PROMPT_TUNING; a multitask prompt has "
                "low-rank factors of its own, leave it out"
            )

    def _count_submodules(self) -> None:
        if self.output_model_types is None or self._has_one_input():
            return
        count = len(self.output_model_types)
        if self.num_transformer_submodules not in (None, count):
            raise ConfigError(
                f"output_model_types {self.output_model_types} means num_transformer_submodules={count}, got "
                f"{self.num_transformer_submodules}; leave one of them out"
            )
        self.num_transformer_submodules = count

    def _check_source(self) -> None:
        init, path = self.prompt_tuning_init, self.prompt_tuning_init_state_dict_path
        if init in SOURCE_INITS and not path:
            raise ConfigError(
                f"prompt_tuning_init_state_dict_path needs to be specified with {init} init method"
            )
        if init not in SOURCE_INITS and path is not None:
            raise ConfigError(
                f"prompt_tuning_init_state_dict_path would be ignored with prompt_tuning_init {init}; "
                f"leave it out, or use one of {', '.join(SOURCE_INITS)}"
            )
        if self.prompt_tuning_init_task != 0 and (
            init != MultitaskPromptTuningInit.EXACT_SOURCE_TASK
        ):
            raise ConfigError(
                f"prompt_tuning_init_task would be ignored with prompt_tuning_init {init}; leave it out, "
                f"or use {MultitaskPromptTuningInit.EXACT_SOURCE_TASK}"
            )
        takes_factors = init in SOURCE_INITS[:2]
        if takes_factors and self.task_matrix_init != TaskMatrixInit.ONES:
            raise ConfigError(
                f"task_matrix_init would be ignored with prompt_tuning_init {init}, which takes the source's; "
                "leave it out"
            )
