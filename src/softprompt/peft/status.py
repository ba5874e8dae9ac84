"""What a prompted model says of itself, under PEFT's names: its task, its prompts and their sizes."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Collection
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.engine import infer_task
from softprompt.errors import InterfaceError
from softprompt.peft.adapters import Adapters
from softprompt.peft.plain_modules import original
from softprompt.prompts import PROMPT_KEY, PeftType, PromptLearningConfig, TaskType

_MERGED = (
    "{0} is not there: a prompt is in no weight of the base. detach() gives the base back; `softprompt convert "
    "--to extended-vocab` writes a model with a saved prompt inside"
)
_STATUS = (
    "{0}() got an invalid PeftModel instance; a prompt has no layers inside the base, see active_adapters, "
    "peft_config and print_trainable_parameters()"
)
_OF_WEIGHTS = dict.fromkeys(
    ("merge_and_unload", "merge_adapter", "unmerge_adapter", "unload", "add_weighted_adapter"), _MERGED
) | dict.fromkeys(("get_layer_status", "get_model_status"), _STATUS)
"""What PEFT has for methods that change weights, and what is said to who asks for it of a prompt."""


class StatusOfAdapters(Adapters, ABC):
    """A frozen base with named prompts that can be asked about them."""

    @property
    def task_type(self) -> TaskType:
        """The task of the first prompt, which all share."""
        first = next(iter(self.peft_config.values()), None)
        return cast(TaskType, first.task_type) if first else infer_task(self.base_model)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss takes Trainer's ``num_items_in_batch``."""
        kinds = [p.kind for p in inspect.signature(self.base_model.forward).parameters.values()]
        return bool(getattr(self.base_model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds))

    @property
    def active_adapters(self) -> list[str]:
        """The active prompt, as a list."""
        return [self.active_adapter] if self.active_adapter else []

    @property
    def peft_type(self) -> PeftType | str | None:
        """The method of the active prompt."""
        return self.active_peft_config.peft_type

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a prompt is active, and not disabled."""
        return bool(self.active_adapter) and not self._disabled

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained with the prompts; None where there are none."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def active_peft_config(self) -> PromptLearningConfig:
        """Configuration of the active prompt."""
        return self.peft_config[self._known(self.active_adapter)]

    def get_base_model(self) -> PreTrainedModel:
        """Return the base model."""
        return cast(PreTrainedModel, original(self.base_model))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a prompt changes no weight that LoRA could stand for."""
        return False

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters train, and how many there are."""
        return _count(self, trainable=True), _count(self, trainable=False)

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(  # noqa: T201 - its whole purpose
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters, prompts included, with transformers' arguments."""
        table = self.base.embedding.parameters() if exclude_embeddings else ()
        return _count(self, trainable=only_trainable, without=list(table))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return the value that is saved, baked: ``[S·P, H]`` on the CPU."""
        return self.encoder_of(adapter_name).stored()[PROMPT_KEY]

    def __getattr__(self, name: str) -> Any:
        """Look up what this module lacks on the base, as PEFT does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name in _OF_WEIGHTS:
                raise InterfaceError(_OF_WEIGHTS[name].format(name)) from None
            return getattr(self.base_model, name)


def _count(module: nn.Module, *, trainable: bool, without: Collection[nn.Parameter] = ()) -> int:
    """Count the parameters of a module, or only those that train, some left out."""
    excluded = {id(parameter) for parameter in without}
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if (parameter.requires_grad or not trainable) and id(parameter) not in excluded
    )
