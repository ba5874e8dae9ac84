"""The trainable module of multitask prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from softprompt.attach.initial import initial_table
from softprompt.errors import ConfigError
from softprompt.prompts import (
    COLS_KEY,
    PROMPT_KEY,
    ROWS_KEY,
    SOURCE_INITS,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PromptModule,
    SourcePrompt,
    TaskMatrices,
    TaskMatrixInit,
    check_task,
    take_over,
)


@final
class MultitaskPromptEmbedding(PromptModule):
    """Shared rows P* and for each task k a matrix of low rank: ``P_k = P* ∘ (U_k V_k)`` (Wang et al. 2023).

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
        """Create and initialise the rows and the matrices.

        Args:
            config: What to create.
            word_embeddings: The base's embedding module.
            source: What ``prompt_tuning_init_state_dict_path`` holds, for the inits that need it.
            generator: Source of randomness; None is torch's global one, as in PEFT.

        Raises:
            ConfigError: If the config, the base and the source do not fit together.
        """
        super().__init__()
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
        """Return the rows ``[S·P, H]`` of a task; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        matrix = self.prefix_task_cols[task] @ self.prefix_task_rows[task]
        return self.embedding.weight * matrix

    def stored(self) -> dict[str, Tensor]:
        """Return the shared rows and both factors, as PEFT stores them; see ``PromptModule``."""
        return {name: value.detach().cpu().clone() for name, value in self._parts().items()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over shared rows and factors; see ``PromptModule``."""
        take_over(self._parts(), tensors)

    def forward(self, indices: Tensor, task_ids: Tensor | None) -> Tensor:
        """Return rows ``[B, N, H]`` for indices ``[B, N]`` and tasks ``[B]``, as PEFT's module does.

        Raises:
            ConfigError: Without task ids, or for one that does not exist.
        """
        if task_ids is None:
            raise ConfigError("task_ids cannot be None")
        tasks = [int(task) for task in task_ids.tolist()]
        prompts = {task: self.materialize(task) for task in sorted(set(tasks))}
        return torch.stack([prompts[task][row] for task, row in zip(tasks, indices, strict=True)])

    def _parts(self) -> dict[str, Tensor]:
        return {
            PROMPT_KEY: self.embedding.weight,
            COLS_KEY: self.prefix_task_cols,
            ROWS_KEY: self.prefix_task_rows,
        }


def _check_shape(name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise ConfigError(
            f"the source prompt's {name} is {list(value.shape)}, this prompt needs {list(target.shape)}; "
            "give num_virtual_tokens, num_ranks and the base of the source"
        )
