"""The one interface of everything that is trained in the place of a prompt.

A prompt is a value: ``materialize`` makes it from whatever parameters are trained, never looking
at the input, so training, serving, composing and saving share one code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts.prompt import Prompt

if TYPE_CHECKING:
    from softprompt.prompts.configs import PromptLearningConfig

PROMPT_KEY = "prompt_embeddings"
"""Name of the baked value in PEFT's weights file."""


class PromptModule(nn.Module, ABC):
    """The parameters behind one named prompt; its attributes are called as in PEFT's modules.

    Attributes:
        kind: ``rows`` for a prompt that stands in the input, ``[S * P, H]``; ``kv`` for one that is
            keys and values of every layer, ``[L, 2, A_kv, P, D]``.
        num_tasks: Tasks (K) that have a value of their own; task ids go from 0 to K - 1.
        config: What says where the prompt stands; None puts all of it in front of the input.
        fixed: Names of parameters that are never trained.
    """

    kind: ClassVar[Literal["rows", "kv"]] = "rows"
    num_tasks: int = 1
    config: PromptLearningConfig | None = None
    fixed: ClassVar[tuple[str, ...]] = ()

    @final
    def prompt(self, task: int = 0) -> Prompt:
        """Return the prompt of a task in float32, with gradients; it never depends on an input.

        Raises:
            ConfigError: If there is no such task.
        """
        values = self.materialize(task)
        return Prompt(input=values) if self.config is None else self.config.prompt_of(values)

    @final
    def set_trainable(self, trainable: bool) -> None:
        """Let the parameters train or not; ``fixed`` ones never do."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable and name not in self.fixed)

    @abstractmethod
    def materialize(self, task: int = 0) -> Tensor:
        """Return the prompt's value for a task in float32, with gradients.

        Raises:
            ConfigError: If there is no such task.
        """

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Return copies of what a file holds, baked, on the CPU, under PEFT's names (``prompt_embeddings`` ...)."""

    @abstractmethod
    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``stored`` returned, or PEFT's file holds.

        Raises:
            ArtifactError: If a tensor is missing, left over or of another shape, or parameters cannot be
                recovered from the baked value.
        """


def check_task(task: int, count: int) -> None:
    """Refuse a task id that a prompt does not have.

    Raises:
        ConfigError: If it is none of 0 to ``count`` - 1.
    """
    if not 0 <= task < count:
        raise ConfigError(
            f"task_ids go from 0 to {count - 1} with num_tasks={count}, got {task}; use one of those"
        )


def check_fit(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that stored tensors have the names and shapes of the parameters they are for.

    Raises:
        ArtifactError: If one is missing, left over, or of another shape.
    """
    for name, target in targets.items():
        if name not in tensors:
            raise ArtifactError(
                f"the saved prompt lacks {name}, expected {list(target.shape)}; save it again"
            )
        if tensors[name].shape != target.shape:
            raise ArtifactError(
                f"{name} is {list(tensors[name].shape)}, but this model needs {list(target.shape)}; "
                "was the prompt made for another base?"
            )
    left = sorted(tensors.keys() - targets.keys())
    if left:
        raise ArtifactError(
            f"the saved prompt holds {', '.join(left)}, which this model has no place for; "
            "is adapter_config.json the one that belongs to it?"
        )


@torch.no_grad()
def take_over(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into parameters of the same names, all of them or none.

    Raises:
        ArtifactError: If they do not fit.
    """
    check_fit(targets, tensors)
    for name, target in targets.items():
        target.copy_(tensors[name])
