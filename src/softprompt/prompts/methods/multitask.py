"""Multitask prompt tuning: one shared prompt, and for each task a low-rank matrix that it is multiplied with.

Task k's prompt is ``P_k = P* ∘ (U_k V_k)`` with P* ``[S·P, H]`` shared by all tasks, U_k ``[S·P, R]`` and V_k
``[R, H]`` the task's own (Wang et al. 2023, arXiv:2303.02861; R = 1 there). PEFT calls U
``prefix_task_cols`` and V ``prefix_task_rows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.fields import check_number, member, setting
from softprompt.prompts import (
    PROMPT_KEY,
    MultitaskPromptTuningInit,
    Parameterization,
    PeftType,
    PromptModule,
    Start,
    TaskMatrixInit,
    check_task,
    take_over,
)
from softprompt.prompts.methods.prompt_tuning import PromptTuningConfig, initial_table

COLS_KEY = "prefix_task_cols"
ROWS_KEY = "prefix_task_rows"

_STD = 0.02

BOTH = ["ENCODER", "DECODER"]
SOURCE_INITS = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)
"""Initialisations that read a source prompt."""

_DOCUMENTED = {"AVERAGE_SOURCE": MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS}
"""caikit's document spells the member so; its code wants PEFT's name."""


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """A prompt shared by K tasks; each multiplies it with a matrix of rank R of its own.

    A seq2seq prompt feeds the encoder and the decoder (S = 2), as in PEFT, whose default that is;
    ``output_model_types=["ENCODER"]``, or ``num_transformer_submodules=1``, leaves the decoder out.

    Under ``inference_mode`` no source is read or needed: a finished prompt has its values.
    """

    method: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING
    inits: ClassVar[type[StrEnum]] = MultitaskPromptTuningInit
    source_inits: ClassVar[tuple[StrEnum, ...]] = SOURCE_INITS
    native_model_types: ClassVar[tuple[list[str] | None, ...]] = (None, ["ENCODER"], BOTH)

    prompt_tuning_init: MultitaskPromptTuningInit | str = setting(
        MultitaskPromptTuningInit.RANDOM, "How the prompt starts."
    )
    prompt_tuning_init_state_dict_path: str | None = setting(None, "Weights file of the source prompt.")
    prompt_tuning_init_task: int | None = setting(0, "Task of the source, for EXACT_SOURCE_TASK.")
    num_ranks: int | None = setting(1, "Rank of the task matrices (R).")
    num_tasks: int | None = setting(1, "Tasks (K).")
    task_matrix_init: TaskMatrixInit | str = setting(TaskMatrixInit.ONES, "How the task matrices start.", ours=True)

    def __post_init__(self) -> None:
        """Validate what is multitask's own.

        Raises:
            ConfigError: For settings that do not exist, are missing, or would be ignored.
        """
        given = str(self.prompt_tuning_init)
        self.prompt_tuning_init = _DOCUMENTED.get(given, self.prompt_tuning_init)
        super().__post_init__()
        self.task_matrix_init = member(TaskMatrixInit, "task_matrix_init", self.task_matrix_init)
        check_number("num_ranks", int, self.num_ranks, least=1)
        check_number("num_tasks", int, self.num_tasks, least=1)
        check_number("prompt_tuning_init_task", int, self.prompt_tuning_init_task, least=0)
        self._refuse_options()
        self._count_submodules()
        if not self.inference_mode:
            self._check_source()

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return the untrained module; see ``PromptLearningConfig``."""
        return MultitaskPromptEmbedding(self, word_embeddings, source=start.source, generator=start.generator)

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
            raise ConfigError(f"prompt_tuning_init_state_dict_path needs to be specified with {init} init method")
        takes_factors = init in SOURCE_INITS[:2]
        if takes_factors and self.task_matrix_init != TaskMatrixInit.ONES:
            raise ConfigError(
                f"task_matrix_init would be ignored with prompt_tuning_init {init}, which takes the source's; "
                "leave it out"
            )

    def refuse_ignored(self) -> None:
        """Refuse a source, or a task of it, that nothing reads; see ``PromptLearningConfig``."""
        init, path = self.prompt_tuning_init, self.prompt_tuning_init_state_dict_path
        if init not in SOURCE_INITS and path is not None:
            raise ConfigError(
                f"prompt_tuning_init_state_dict_path would be ignored with prompt_tuning_init {init}; "
                f"leave it out, or use one of {', '.join(SOURCE_INITS)}"
            )
        if self.prompt_tuning_init_task != 0 and (init != MultitaskPromptTuningInit.EXACT_SOURCE_TASK):
            raise ConfigError(
                f"prompt_tuning_init_task would be ignored with prompt_tuning_init {init}; leave it out, "
                f"or use {MultitaskPromptTuningInit.EXACT_SOURCE_TASK}"
            )


@final
class MultitaskPromptEmbedding(PromptModule):
    """Shared embeddings P* and for each task k a matrix of low rank: ``P_k = P* ∘ (U_k V_k)`` (Wang et al. 2023).

    ``embedding.weight`` is P* ``[S·P, H]``, ``prefix_task_cols`` U ``[K, S·P, R]`` and
    ``prefix_task_rows`` V ``[K, R, H]``, all float32. The paper has R = 1.

    The matrices start at exactly 1, so that every task starts at P* and an initial text or a source
    prompt means something; ``task_matrix_init="normal"`` is PEFT's start near zero, drawn in PEFT's order.
    """

    def __init__(
        self,
        config: MultitaskPromptTuningConfig,
        word_embeddings: nn.Embedding,
        *,
        source: SourcePrompt | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create and initialise the shared embeddings and the matrices."""
        super().__init__(config)
        self.embedding = initial_table(config, word_embeddings, generator)
        length, width = self.embedding.weight.shape
        self.num_tasks, self.num_ranks = config.num_tasks or 1, config.num_ranks or 1
        # PEFT knows no limit, so a finished prompt may be past it.
        if self.num_ranks > min(length, width) and not config.inference_mode:
            raise ConfigError(
                f"num_ranks {self.num_ranks} restricts nothing for task matrices {[length, width]}; use at "
                f"most {min(length, width)}"
            )
        size = self.num_tasks, length, self.num_ranks, width
        near_zero = config.task_matrix_init == TaskMatrixInit.NORMAL
        matrices = (TaskMatrices.normal if near_zero else TaskMatrices.ones)(size, generator)
        self.prefix_task_cols = nn.Parameter(matrices.cols)
        self.prefix_task_rows = nn.Parameter(matrices.rows)
        if config.prompt_tuning_init in SOURCE_INITS and not config.inference_mode:
            self._start_from(config, source)

    @torch.no_grad()
    def _start_from(self, config: MultitaskPromptTuningConfig, source: SourcePrompt | None) -> None:
        init = config.prompt_tuning_init
        if source is None:
            raise ConfigError(f"prompt_tuning_init {init} needs the source prompt; read it first")
        _check_shape("prompt_embeddings", source.embeddings, self.embedding.weight)
        self.embedding.weight.copy_(source.embeddings)
        if init == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            return
        if source.matrices is None:
            raise ConfigError(
                f"prompt_tuning_init {init} needs a multitask source, this one has prompt_embeddings only; "
                f"use {MultitaskPromptTuningInit.ONLY_SOURCE_SHARED}"
            )
        if init == MultitaskPromptTuningInit.EXACT_SOURCE_TASK:
            chosen = source.matrices.only(config.prompt_tuning_init_task or 0)
        else:
            chosen = source.matrices.average()
        matrices = chosen.repeated(self.num_tasks)
        _check_shape(COLS_KEY, matrices.cols, self.prefix_task_cols)
        self.prefix_task_cols.copy_(matrices.cols)
        self.prefix_task_rows.copy_(matrices.rows)

    def materialize(self, task: int = 0) -> Tensor:
        """Return the embeddings ``[S·P, H]`` of a task; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        matrix = self.prefix_task_cols[task] @ self.prefix_task_rows[task]
        return self.embedding.weight * matrix

    def stored(self) -> dict[str, Tensor]:
        """Return the shared embeddings and both factors, as PEFT stores them; see ``PromptModule``."""
        return {name: value.detach().cpu().clone() for name, value in self._parts().items()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load shared embeddings and factors; see ``PromptModule``."""
        take_over(self._parts(), tensors)

    def forward(self, indices: Tensor, task_ids: Tensor | None) -> Tensor:
        """Return embeddings ``[B, N, H]`` for indices ``[B, N]`` and tasks ``[B]``, as PEFT's module does.

        Raises:
            ConfigError: Without task ids, or for one that does not exist.
        """
        if task_ids is None:
            raise ConfigError("task_ids cannot be None")
        tasks = [int(task) for task in task_ids.tolist()]
        prompts = {task: self.materialize(task) for task in sorted(set(tasks))}
        return torch.stack([prompts[task][row] for task, row in zip(tasks, indices, strict=True)])

    def _parts(self) -> dict[str, Tensor]:
        return {PROMPT_KEY: self.embedding.weight, COLS_KEY: self.prefix_task_cols, ROWS_KEY: self.prefix_task_rows}


@dataclass(frozen=True, slots=True)
class TaskMatrices:
    """Both factors of all task matrices: U ``cols`` ``[K, S·P, R]`` and V ``rows`` ``[K, R, H]``."""

    cols: Tensor
    rows: Tensor

    @classmethod
    def ones(cls, size: tuple[int, int, int, int], generator: torch.Generator | None) -> TaskMatrices:
        """Return factors whose product is exactly 1, for (K, S·P, R, H).

        The first rank is ones times ones. U of the others is drawn from N(0, 1) and their V is 0: the
        product stays 1, each rank learns as fast as the first, and no two ranks get
        the same gradient, as they would if all were alike.
        """
        tasks, length, rank, width = size
        cols = torch.ones(tasks, length, rank)
        if rank > 1:
            cols = torch.randn(tasks, length, rank, generator=generator)
            cols[..., 0] = 1
        rows = torch.zeros(tasks, rank, width)
        rows[:, 0] = 1
        return cls(cols, rows)

    @classmethod
    def normal(cls, size: tuple[int, int, int, int], generator: torch.Generator | None) -> TaskMatrices:
        """Return PEFT's start for (K, S·P, R, H): both factors from N(0, 0.02²)."""
        tasks, length, rank, width = size
        cols = torch.normal(0.0, _STD, (tasks, length, rank), generator=generator)
        return cls(cols, torch.normal(0.0, _STD, (tasks, rank, width), generator=generator))

    def average(self) -> TaskMatrices:
        """Return one task whose factors are the means over the tasks, each by itself, as in PEFT."""
        return TaskMatrices(*(each.mean(dim=0, keepdim=True) for each in (self.cols, self.rows)))

    def only(self, task: int) -> TaskMatrices:
        """Return one task, that of an id.

        Raises:
            ConfigError: If there is no such task.
        """
        count = self.cols.shape[0]
        if not 0 <= task < count:
            raise ConfigError(
                f"prompt_tuning_init_task must be one of the source's {count} tasks, 0 to {count - 1}, got {task}"
            )
        return TaskMatrices(self.cols[task : task + 1], self.rows[task : task + 1])

    def repeated(self, tasks: int) -> TaskMatrices:
        """Return as many copies of a single task."""
        return TaskMatrices(self.cols.repeat(tasks, 1, 1), self.rows.repeat(tasks, 1, 1))


@dataclass(frozen=True, slots=True)
class SourcePrompt:
    """A trained prompt to start from: shared embeddings ``[S·P, H]``, and factors if it has tasks."""

    embeddings: Tensor
    matrices: TaskMatrices | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], where: str) -> SourcePrompt:
        """Return the source prompt that named tensors hold.

        Args:
            tensors: ``prompt_embeddings``, and ``prefix_task_cols`` with ``prefix_task_rows`` or neither.
            where: File they were read from, for messages.

        Raises:
            ConfigError: If they are no such prompt.
        """
        missing = {PROMPT_KEY, COLS_KEY, ROWS_KEY} - tensors.keys()
        if missing not in (set(), {COLS_KEY, ROWS_KEY}):
            raise ConfigError(
                f"the source prompt {where} lacks {', '.join(sorted(missing))}, it holds "
                f"{', '.join(sorted(tensors)[:4]) or 'nothing'}; give the weights file of a multitask prompt"
            )
        embeddings = tensors[PROMPT_KEY].float()
        factors = None if missing else (tensors[COLS_KEY].float(), tensors[ROWS_KEY].float())
        shapes = [list(each.shape) for each in (embeddings, *(factors or ()))]
        if not _agree(shapes):
            raise ConfigError(
                f"the source prompt {where} must hold prompt_embeddings [S*P, H], prefix_task_cols "
                f"[K, S*P, R] and prefix_task_rows [K, R, H], it holds {', '.join(map(str, shapes))}"
            )
        if not all(bool(each.isfinite().all()) for each in (embeddings, *(factors or ()))):
            raise ConfigError(f"the source prompt {where} holds NaN or infinity; use another one")
        return cls(embeddings, None if factors is None else TaskMatrices(*factors))


def _agree(shapes: list[list[int]]) -> bool:
    if [len(shape) for shape in shapes] not in ([2], [2, 3, 3]):
        return False
    if len(shapes) == 1:
        return True
    (length, width), cols, rows = shapes
    return cols == [rows[0], length, rows[1]] and rows[2] == width and rows[0] > 0


def _check_shape(name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise ConfigError(
            f"the source prompt's {name} is {list(value.shape)}, this prompt needs {list(target.shape)}; "
            "give num_virtual_tokens, num_ranks and the base of the source"
        )
