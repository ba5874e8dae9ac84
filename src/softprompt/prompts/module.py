"""The one interface of everything that is trained to be a prompt.

A prompt is a value: ``materialize`` makes it from whatever parameters are trained, never looking
at the input, so training, serving, composing and saving share one code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor, nn

from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts.configs import PeftConfig, PromptLearningConfig
from softprompt.prompts.prompt import Prompt

if TYPE_CHECKING:
    from softprompt.prompts.methods import SourcePrompt

PROMPT_KEY = "prompt_embeddings"
"""Name of the baked value in PEFT's weights file."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a prompt's first values are made of, besides the configuration and the base's embeddings.

    Attributes:
        generator: Source of randomness; None is torch's global one, as in PEFT.
        source: Trained multitask prompt that a multitask prompt starts from.
        key_values: Returns the base's keys and values ``[L, 2, A_kv, T, D]`` of T token ids; a prefix or
            cartridge that starts as a text needs it.
    """

    generator: torch.Generator | None = None
    source: SourcePrompt | None = None
    key_values: Callable[[Sequence[int]], Tensor] | None = None


class PromptModule(nn.Module, ABC):
    """The parameters behind one named prompt; its attributes have the names of PEFT's modules.

    Constructors take the configuration, its sizes filled in; what the first values are made of (the base's
    embedding module ``word_embeddings``, a ``source`` prompt, the keys and values ``text``
    ``[L, 2, A_kv, P, D]`` of an initial text); and ``generator``, None for torch's global one, drawn from in
    PEFT's order. Each raises ConfigError if a size is missing, or these do not fit together. Under
    ``inference_mode`` nothing is drawn or read, as the values are about to be loaded.

    Attributes:
        config: What the module was made from; it says which parts of the base the prompt feeds. None
            puts all of it in front of the input.
        num_tasks: Tasks (K) that have a value of their own; task ids go from 0 to K - 1.
        fixed: Names of parameters that are never trained.
    """

    config: PromptLearningConfig | None
    num_tasks: int = 1
    fixed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: PromptLearningConfig | None = None) -> None:
        """Keep the configuration that is about to be built."""
        super().__init__()
        self.config = config

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
        """Return a task's embeddings ``[S·P, H]``, or keys and values ``[L, 2, A_kv, P, D]``, with gradients.

        Raises:
            ConfigError: If there is no such task.
        """

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Return copies of what a file holds, baked, on the CPU, under PEFT's names (``prompt_embeddings`` ...)."""

    @abstractmethod
    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what ``stored`` returned, or PEFT's file holds.

        Raises:
            ArtifactError: If a tensor is missing, left over or of another shape, or parameters cannot be
                recovered from the baked value.
        """


def build_prompt(
    config: PeftConfig,
    word_embeddings: nn.Embedding,
    *,
    generator: torch.Generator | None = None,
    source: SourcePrompt | None = None,
    key_values: Callable[[Sequence[int]], Tensor] | None = None,
) -> PromptModule:
    """Return the untrained module of a configuration whose sizes are filled in; no file is read.

    Args:
        config: What to build.
        word_embeddings: The base's input embedding; gives the embeddings for TEXT and the like.
        generator: Source of randomness; None is torch's global one, as in PEFT.
        source: Trained multitask prompt, for the inits that start from one.
        key_values: Returns the base's keys and values ``[L, 2, A_kv, T, D]`` of T token ids, for a prefix
            or cartridge that starts as a text.

    Raises:
        ConfigError: If no method belongs to the configuration, or it lacks something.
    """
    if not isinstance(config, PromptLearningConfig):
        raise ConfigError(f"expected the configuration of a prompt, got a {type(config).__name__}")
    return config.build(word_embeddings, Start(generator, source, key_values))


def check_task(task: int, count: int) -> None:
    """Raise for a task id that a prompt does not have.

    Raises:
        ConfigError: If it is none of 0 to ``count`` - 1.
    """
    if not 0 <= task < count:
        raise ConfigError(f"task_ids go from 0 to {count - 1} with num_tasks={count}, got {task}; use one of those")


def check_fit(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that stored tensors have the names and shapes of the parameters they are for.

    Raises:
        ArtifactError: If one is missing, left over, or of another shape.
    """
    for name, target in targets.items():
        if name not in tensors:
            raise ArtifactError(f"the saved prompt lacks {name}, expected {list(target.shape)}; save it again")
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
