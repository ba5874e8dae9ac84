"""The named prompts and trained heads on one frozen base: add, choose, delete and detach them."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.artifacts import Manifest, started_prompt
from softprompt.backbone import Base, Facts, freeze, in_own_dtype, modules_named, set_module, vocabulary_of
from softprompt.engine import TASK_RULES, completed
from softprompt.errors import AdapterError, ConfigError, InterfaceError, nearest
from softprompt.peft.plain_modules import as_pretrained, original
from softprompt.prompts import (
    KnownToPeft,
    PeftConfig,
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptModule,
    TaskType,
    take_over,
)
from softprompt.untrusted import most_weight_bytes

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Adapters(KnownToPeft, nn.Module, ABC):
    """A frozen base and its prompts: ``prompt_encoder[name]``, ``peft_config[name]``, ``manifests[name]``."""

    task: ClassVar[TaskType | None] = None

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        module: PromptModule | None = None,
        trained_heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Freeze ``model`` and attach a first prompt; see ``add_adapter``.

        Raises:
            ConfigError: If the model or the configuration is not supported.
        """
        super().__init__()
        model = as_pretrained(model, peft_config)
        self.base_model = model
        self.prompt_encoder = nn.ModuleDict()
        self.peft_config: dict[str, PromptLearningConfig] = {}
        self.manifests: dict[str, Manifest] = {}
        self.active_adapter = adapter_name
        self._frozen: set[str] = set()
        self._disabled = False
        self.facts: Facts = self.base.facts
        self._arguments_of_forward = tuple(inspect.signature(model.forward).parameters)
        self.add_adapter(adapter_name, peft_config, module=module, trained_heads=trained_heads)
        # Only now that nothing raises any more is the base touched.
        freeze(model)
        self._vocabulary = vocabulary_of(model)
        self.set_adapter(adapter_name)

    @property
    def base(self) -> Base:
        """A handle on the base, without a tokenizer."""
        return Base(self.base_model)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        generator: torch.Generator | None = None,
        module: PromptModule | None = None,
        trained_heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Add a prompt; it becomes active only by ``set_adapter``.

        Prompts are float32 and small, so ``low_cpu_mem_usage`` and ``autocast_adapter_dtype`` change nothing.
        ``generator`` draws its first values; None is torch's global one, as in PEFT. ``module`` and
        ``trained_heads``, modules by their paths in the base, are parameters to share instead of new ones.

        Raises:
            AdapterError: If the name is taken or not a plain name.
            ConfigError: If the configuration does not fit this model.
        """
        _check_new(adapter_name, self)
        config = completed(
            peft_config, self.base, shared=next(iter(self.peft_config.values()), None), own=self.task
        )
        optional = TASK_RULES[cast(TaskType, config.task_type)].heads
        paths = modules_named(self.base_model, config.modules_to_save or [], optional=optional)
        require_free(self.base_model, paths, adapter_name)
        if peft_config.came_in_a_file:
            _check_size(config, self.base_model)
        encoder = module or started_prompt(config, self.base_model, generator=generator)
        with self.base.lock:
            self.prompt_encoder[adapter_name] = encoder.to(self.base.device)
            self.peft_config[adapter_name] = config
            add_heads(self.base_model, paths, adapter_name, trained_heads)
        if config.inference_mode:
            self._frozen.add(adapter_name)
        self._set_gradients()

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make a prompt the active one; only the active prompt is trainable, none in ``inference_mode``.

        Raises:
            AdapterError: If there is no such prompt.
        """
        self.active_adapter = self._known(adapter_name)
        self._set_gradients()
        if inference_mode:
            self.encoder_of(adapter_name).set_trainable(False)
            for _, head in heads_of(self.base_model, adapter_name):
                head.requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Raise ``InterfaceError``, as PEFT does for prompts: ``set_adapter`` says which one trains."""
        raise InterfaceError(
            "Setting `requires_grad` is not supported for prompt learning methods like "
            f"{self.peft_config[self.active_adapter].peft_type}; set_adapter(name) makes a prompt trainable"
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a prompt; deleting the active one makes the first of the others active.

        After the last one there is no active prompt, and calls raise until another is added and set.

        Raises:
            AdapterError: If there is no such prompt.
        """
        self._known(adapter_name)
        with self.base.lock:
            del self.peft_config[adapter_name]
            del self.prompt_encoder[adapter_name]
            self.manifests.pop(adapter_name, None)
            self._frozen.discard(adapter_name)
            for _, switch in switches_of(self.base_model):
                if adapter_name in switch.modules_to_save:
                    del switch.modules_to_save[adapter_name]
        if self.active_adapter == adapter_name and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))
        elif not self.peft_config:
            self.active_adapter = ""

    def thaw(self, adapter_name: str) -> None:
        """Let a prompt that was loaded frozen be trained further.

        Raises:
            AdapterError: If there is no such prompt.
        """
        self._frozen.discard(self._known(adapter_name))
        config = self.peft_config[adapter_name]
        config.inference_mode = False
        if isinstance(config, PrefixTuningConfig) and config.prefix_projection:
            logger.warning(
                "the file of a projected prefix holds its keys and values only: they are trained directly from here"
            )
            config.prefix_projection, config.encoder_hidden_size = False, None
        self._set_gradients()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base alone inside the context, in ``forward`` and ``generate`` of every task."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def detach(self) -> PreTrainedModel:
        """Take everything off and return the base, its outputs bit-identical to before."""
        self._vocabulary.remove()
        for path, switch in list(switches_of(self.base_model)):
            set_module(self.base_model, path, switch.original_module)
        return cast(PreTrainedModel, original(self.base_model))

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let a model's embeddings take a gradient, which reentrant checkpointing of a frozen base needs.

        A quantised model does that by itself.
        """
        if not any(getattr(model, f"is_{how}", False) for how in ("loaded_in_8bit", "loaded_in_4bit", "quantized")):
            cast(Any, model).enable_input_require_grads()

    def encoder_of(self, name: str) -> PromptModule:
        """Return the trainable module of a prompt.

        Raises:
            AdapterError: If there is no such prompt.
        """
        return cast(PromptModule, self.prompt_encoder[self._known(name)])

    def _set_gradients(self) -> None:
        """Let the active prompt and its heads train, unless it was loaded frozen."""
        for name in self.peft_config:
            trains = name == self.active_adapter and name not in self._frozen
            self.encoder_of(name).set_trainable(trains)
            for _, head in heads_of(self.base_model, name):
                head.requires_grad_(trains)

    def _known(self, name: str) -> str:
        """Return a name that is attached; raise ``AdapterError`` for any other."""
        if not self.peft_config:
            raise AdapterError("no prompt is attached, the last one was deleted; add_adapter and set_adapter first")
        if name not in self.peft_config:
            raise AdapterError(
                f"Adapter {name} not found.{nearest(name, self.peft_config)} There are: "
                f"{', '.join(self.peft_config)}"
            )
        return name


def _check_new(name: str, adapters: Adapters) -> None:
    """Raise ``AdapterError`` for a name that is taken, no plain folder name, or refused by torch's module dict."""
    if name in adapters.peft_config:
        raise AdapterError(f"Adapter with name '{name}' already exists.")
    if not _NAME.fullmatch(name) or name == BASE:
        raise AdapterError(f"adapter name must match {_NAME.pattern} and not be {BASE!r}, got {name!r}")
    if hasattr(adapters.prompt_encoder, name):
        raise AdapterError(f"adapter name {name!r} is a word torch keeps for itself; choose another")


def _check_size(config: PromptLearningConfig, base: nn.Module) -> None:
    """Raise ``ConfigError`` for a module of more numbers than the base and a file of weights both have."""

    def size(name: str) -> int:
        return getattr(config, name, None) or 0

    width, tokens = size("token_dim"), size("num_virtual_tokens") * (size("num_transformer_submodules") or 1)
    columns = 4 * size("num_layers") * width if config.keys_and_values else width
    ranks = size("num_tasks") * size("num_ranks") + size("parameterization_rank")
    numbers = tokens * columns + ranks * (tokens + width)
    if not config.inference_mode and (size("encoder_num_layers") or size("prefix_projection")):
        hidden, kind = size("encoder_hidden_size") or width, getattr(config, "encoder_reparameterization_type", "")
        layers = 24 * size("encoder_num_layers") if kind == "LSTM" else 1  # 4 gates, both ways, 3 inputs at most
        numbers += hidden * (columns + width + hidden * layers)
    if 4 * numbers > most_weight_bytes() and numbers > sum(each.numel() for each in base.parameters()):
        raise ConfigError(
            f"a {config.peft_type} prompt of these sizes may have {numbers:,} numbers, more than its base: lower "
            "them in adapter_config.json, or give a configuration of your own"
        )


BASE = "__base__"
"""The name that stands for no prompt in ``adapter_names``."""


class ModulesToSaveWrapper(nn.Module):
    """One module of the base, with a trained copy for each adapter.

    ``active`` names the copy to run, one name for the batch or one per row; None and
    ``__base__`` run the original, whose weights never change.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.active: str | tuple[str, ...] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active copy, or each row through its own."""
        if not isinstance(self.active, tuple):
            return self._run(self.active, args, kwargs)
        first: Tensor = args[0]
        # Beams and returned sequences repeat each row.
        times = first.shape[0] // len(self.active)
        names = [name for name in self.active for _ in range(times)]
        result: Tensor | None = None
        for name in dict.fromkeys(self.active):
            index = torch.tensor([i for i, n in enumerate(names) if n == name], device=first.device)
            part = self._run(name, (first[index], *args[1:]), kwargs)
            if result is None:
                result = part.new_empty((first.shape[0], *part.shape[1:]))
            result = result.index_copy(0, index, part)
        return result

    def _run(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trained = name is not None and name in self.modules_to_save
        head = self.modules_to_save[cast(str, name)] if trained else self.original_module
        return in_own_dtype(head, *args, **kwargs)


def require_free(model: nn.Module, paths: Sequence[str], adapter: str) -> None:
    """Raise ``AdapterError`` for a second trained copy under one name, of another prompted model on the base."""
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            raise AdapterError(
                f"the base already carries a {path} for an adapter named {adapter!r}, of another prompted "
                "model; unload that one first, or give this adapter another name"
            )


def add_heads(
    model: nn.Module, paths: Sequence[str], adapter: str, trained: Mapping[str, nn.Module] | None = None
) -> None:
    """Replace each module by a switch, with an adapter's module among ``trained`` or a float32 copy."""
    for path in paths:
        current = model.get_submodule(path)
        if not isinstance(current, ModulesToSaveWrapper):
            current = ModulesToSaveWrapper(current)
            set_module(model, path, current)
        own = (trained or {}).get(path)
        if own is None:
            own = copy.deepcopy(current.original_module).float()
        current.modules_to_save[adapter] = own


@contextmanager
def active_heads(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """Run the heads of each row's adapter inside the context; hold the model's lock around it."""
    switches = [switch for _, switch in switches_of(model)]
    for switch in switches:
        switch.active = adapters[0] if len(set(adapters)) == 1 else tuple(adapters)
    try:
        yield
    finally:
        for switch in switches:
            switch.active = None


def switches_of(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """Yield the switched modules of a model with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield path, module


def heads_of(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield an adapter's copies with the paths of the modules they stand for."""
    for path, switch in switches_of(model):
        if adapter in switch.modules_to_save:
            yield path, switch.modules_to_save[adapter]


class LoadResult(NamedTuple):
    """What loading found: names of the model that were not there, and names that it has no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_base_model_state_dict(model: Adapters) -> dict[str, Tensor]:
    """Return the base's own state dict, under the names that it has without prompts, sharing its memory."""
    state = dict(model.base_model.state_dict())
    for path, _ in switches_of(model.base_model):
        trained, original = f"{path}.modules_to_save.", f"{path}.original_module."
        state = {
            name.replace(original, f"{path}.", 1) if name.startswith(original) else name: value
            for name, value in state.items()
            if not name.startswith(trained)
        }
    return state


@torch.no_grad()
def set_base_model_state_dict(model: Adapters, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load what ``get_base_model_state_dict`` returned into the base.

    Returns:
        The names that were missing, and those left over; without ``strict`` both may be.

    Raises:
        RuntimeError: If names are missing or left over, and ``strict``; nothing is loaded then.
    """
    own = get_base_model_state_dict(model)
    missing, left = [n for n in own if n not in state_dict], [n for n in state_dict if n not in own]
    if strict and (missing or left):
        raise RuntimeError(f"Missing key(s) in state_dict: {missing}. Unexpected key(s) in state_dict: {left}.")
    both = own.keys() & state_dict.keys()
    take_over({name: own[name] for name in both}, {name: state_dict[name] for name in both})
    return LoadResult(missing, left)
