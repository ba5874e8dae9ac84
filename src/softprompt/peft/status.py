"""What a prompted model says of itself, under PEFT's names: its task, its prompts and their sizes."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Collection
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from softprompt.engine import Prefixes, infer_task
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

    @property
    def word_embeddings(self) -> nn.Module:
        """The table that the input's ids are looked up in."""
        return self.base.embedding

    @property
    def base_model_torch_dtype(self) -> torch.dtype:
        """The dtype of the base."""
        return self.base.dtype

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Tensor | Cache:
        """Return the active prompt for every row: virtual tokens ``[B, P, H]``, or a cache of keys and values.

        ``task_ids``, ``[B]``, are for multitask prompts.
        """
        tasks = [0] * batch_size if task_ids is None else task_ids.tolist()
        encoder, dtype = self.encoder_of(self.active_adapter), self.base.dtype
        made = {task: encoder.prompt(task) for task in dict.fromkeys(tasks)}
        prefixes = Prefixes.of([made[task] for task in tasks])
        if prefixes is None:
            return torch.stack([torch.cat(made[task].tensors) for task in tasks]).to(dtype)
        cache = DynamicCache()
        prefixes.fill(cache, torch.empty(0, dtype=dtype, device=self.base.device))
        return cache

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


def get_layer_status(model: nn.Module) -> NoReturn:
    """Raise ``InterfaceError``, as PEFT does for prompts, which have no layers inside the base."""
    raise InterfaceError(_STATUS.format("get_layer_status"))


def get_model_status(model: nn.Module) -> NoReturn:
    """Raise ``InterfaceError``; see ``get_layer_status``."""
    raise InterfaceError(_STATUS.format("get_model_status"))


def _count(module: nn.Module, *, trainable: bool, without: Collection[nn.Parameter] = ()) -> int:
    """Count the parameters of a module, or only those that train, some left out."""
    excluded = {id(parameter) for parameter in without}
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if (parameter.requires_grad or not trainable) and id(parameter) not in excluded
    )
