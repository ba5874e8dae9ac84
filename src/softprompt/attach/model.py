"""Named soft prompts on one frozen model, under PEFT's interface.

The base is never wrapped layer by layer: its input embedding carries a hook that is idle
except inside our own calls, and task heads are switched. ``unload`` takes both away.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from softprompt.artifacts.manifest import Manifest
from softprompt.attach import heads, saving
from softprompt.attach.embedding import PromptEmbedding
from softprompt.attach.generation import check_generation, encoder_kwargs, prompted_steps
from softprompt.attach.heads import BASE
from softprompt.attach.inputs import Call, prompted_inputs
from softprompt.attach.tasks import RULES, infer_task
from softprompt.backbone.facts import Facts, facts_of, input_embedding
from softprompt.backbone.freeze import freeze
from softprompt.engine.layout import Prompts
from softprompt.engine.virtual import VirtualVocabulary
from softprompt.errors import AdapterError, ConfigError, nearest
from softprompt.prompts.configs import PeftConfig, PromptTuningConfig, TaskType

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class PeftModel(nn.Module, PushToHubMixin):
    """A frozen base with named prompts; the subclasses only name the task.

    Prompts are ``prompt_encoder[name].embedding.weight``, float32 ``[P, H]``.
    """

    task: ClassVar[TaskType | None] = None
    classes: ClassVar[dict[TaskType, type[PeftModel]]] = {}

    def __init_subclass__(cls, task: TaskType) -> None:
        """Register the class of a task type."""
        super().__init_subclass__()
        cls.task = task
        PeftModel.classes[task] = cls

    def __init__(
        self, model: PreTrainedModel, peft_config: PeftConfig, adapter_name: str = "default"
    ) -> None:
        """Freeze ``model`` and attach a first prompt.

        Raises:
            ConfigError: If the model or the configuration cannot be used.
        """
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(f"expected a transformers model, got a {type(model).__name__}")
        self.base_model = model
        self.prompt_encoder = nn.ModuleDict()
        self.peft_config: dict[str, PromptTuningConfig] = {}
        self.manifests: dict[str, Manifest] = {}
        self.active_adapter = adapter_name
        self._frozen: set[str] = set()
        self._disabled = False
        freeze(model)
        self._vocabulary = VirtualVocabulary(input_embedding(model))
        self.facts: Facts = facts_of(model)
        self._parameters_of_forward = tuple(inspect.signature(model.forward).parameters)
        self.add_adapter(adapter_name, peft_config)
        self.set_adapter(adapter_name)

    # -- adapters ---------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add an untrained prompt; it becomes active only by ``set_adapter``.

        Raises:
            AdapterError: If the name is taken or not a plain name.
            ConfigError: If the configuration does not fit this model.
        """
        if adapter_name in self.peft_config:
            raise AdapterError(f"Adapter with name '{adapter_name}' already exists.")
        if not _NAME.fullmatch(adapter_name) or adapter_name == BASE:
            raise AdapterError(
                f"adapter name must match {_NAME.pattern} and not be {BASE!r}, got {adapter_name!r}"
            )
        config = self._completed(peft_config)
        encoder = PromptEmbedding(config, input_embedding(self.base_model), generator=generator)
        self.prompt_encoder[adapter_name] = encoder.to(self.base_model.device)
        self.peft_config[adapter_name] = config
        wanted = config.modules_to_save or []
        required = [name for name in wanted if name not in RULES[self.task_type].heads]
        paths = heads.find_heads(self.base_model, wanted, required=required)
        for switch in heads.switch_heads(self.base_model, paths).values():
            switch.add(adapter_name)
        if config.inference_mode:
            self._frozen.add(adapter_name)
        self._set_gradients()

    def set_adapter(self, adapter_name: str) -> None:
        """Make a prompt the active one; only the active prompt is trainable.

        Raises:
            AdapterError: If there is no such prompt.
        """
        self.active_adapter = self._known(adapter_name)
        self._set_gradients()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a prompt; deleting the active one makes the first of the others active.

        Raises:
            AdapterError: If there is no such prompt, or it is the last one.
        """
        self._known(adapter_name)
        if len(self.peft_config) == 1:
            raise AdapterError(
                f"'{adapter_name}' is the last prompt; use unload() to get the base back"
            )
        del self.peft_config[adapter_name]
        del self.prompt_encoder[adapter_name]
        self.manifests.pop(adapter_name, None)
        self._frozen.discard(adapter_name)
        for _, switch in heads.switches_of(self.base_model):
            if adapter_name in switch.modules_to_save:
                del switch.modules_to_save[adapter_name]
        if self.active_adapter == adapter_name:
            self.set_adapter(next(iter(self.peft_config)))

    def thaw(self, adapter_name: str) -> None:
        """Let a prompt that was loaded frozen be trained further.

        Raises:
            AdapterError: If there is no such prompt.
        """
        self._frozen.discard(self._known(adapter_name))
        self.peft_config[adapter_name].inference_mode = False
        self._set_gradients()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base alone inside the context, in ``forward`` and ``generate`` of every task."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def unload(self) -> PreTrainedModel:
        """Detach everything and return the base, its outputs bit-identical to before."""
        self._vocabulary.remove()
        heads.restore_heads(self.base_model)
        return self.base_model

    # -- running ----------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the base on prompted inputs; outputs cover P + T columns, text column t at P + t.

        Args:
            *args: The base's positional arguments.
            adapter_names: A prompt for each row, ``__base__`` for none; None is the active one.
            **kwargs: The base's keyword arguments; masks and labels cover the text alone.

        Raises:
            AdapterError: For an unknown name, or not one name a row.
            ConfigError: If the arguments do not fit together.
            ContextOverflowError: If prompt and input exceed the model's context.
        """
        inputs = self._bound(args, kwargs)
        with self._prompted(adapter_names, _batch_size(inputs)) as prompts:
            if prompts is not None:
                call = Call(inputs, prompts, self.facts, RULES[self.task_type])
                inputs = prompted_inputs(call)
            return self.base_model(**inputs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generate with transformers' ``generate``; sequences hold no virtual tokens.

        Args:
            *args: At most the input ids, as transformers takes them.
            adapter_names: A prompt for each input row, ``__base__`` for none.
            **kwargs: What ``generate`` of the base takes; lengths count text tokens.

        Raises:
            AdapterError: For an unknown name, or not one name a row.
            ConfigError: For speculative decoding.
            ContextOverflowError: If prompt, input and new tokens cannot fit.
        """
        self._refuse_task_ids(kwargs)
        kwargs.setdefault("generation_config", self.__dict__.get("generation_config"))
        if args:
            kwargs["inputs"] = args[0]
        if kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        with self._prompted(adapter_names, _batch_size(kwargs)) as prompts, torch.no_grad():
            if prompts is None:
                return cast(Any, self.base_model).generate(*args[1:], **kwargs)
            kwargs = check_generation(self.base_model, self.facts, prompts, kwargs)
            if self.facts.is_encoder_decoder:
                kwargs = encoder_kwargs(self.base_model, self.facts, prompts, kwargs)
                return cast(Any, self.base_model).generate(*args[1:], **kwargs)
            with prompted_steps(self.base_model, prompts, self.facts):
                return cast(Any, self.base_model).generate(*args[1:], **kwargs)

    @contextmanager
    def _prompted(self, names: Sequence[str] | None, batch: int) -> Iterator[Prompts | None]:
        """Lend the rows' prompts to the embedding and switch the heads; None when no row has one."""
        rows = self._row_names(names, batch)
        distinct = [name for name in dict.fromkeys(rows) if name != BASE]
        active = rows[0] if len(set(rows)) == 1 else tuple(rows)
        switches = [switch for _, switch in heads.switches_of(self.base_model)]
        for switch in switches:
            switch.active = active
        try:
            if not distinct:
                yield None
                return
            values = [self.encoder_of(name).materialize() for name in distinct]
            prompts = Prompts.of(values, [-1 if n == BASE else distinct.index(n) for n in rows])
            with self._vocabulary.lend(prompts.table):
                yield prompts
        finally:
            for switch in switches:
                switch.active = None

    def _row_names(self, names: Sequence[str] | None, batch: int) -> list[str]:
        if self._disabled:
            return [BASE] * batch
        if names is None:
            return [self.active_adapter] * batch
        if len(names) != batch:
            raise AdapterError(
                f"adapter_names must hold one name a row: {batch} rows, got {len(names)} names"
            )
        return [name if name == BASE else self._known(name) for name in names]

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        self._refuse_task_ids(kwargs)
        if len(args) > len(self._parameters_of_forward):
            raise ConfigError(
                f"{self.facts.architecture}.forward got {len(args)} positional arguments"
            )
        named = dict(zip(self._parameters_of_forward, args, strict=False))
        return {**named, **kwargs}

    def _refuse_task_ids(self, kwargs: dict[str, Any]) -> None:
        if kwargs.pop("task_ids", None) is not None:
            raise ConfigError(
                "task_ids belong to multitask prompts; this prompt has one task, leave them out"
            )

    # -- files ------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write prompts in PEFT's layout: ``default`` into the folder, others into ``<folder>/<name>/``.

        Args:
            save_directory: Made if needed; a prompt already there is replaced, as in PEFT.
            selected_adapters: Names to save; None saves all.
            safe_serialization: Must stay True, no pickle is written.
            **kwargs: ``push_to_hub=True`` and its arguments.

        Raises:
            AdapterError: For an unknown name.
            ArtifactError: If the files cannot be written.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle; leave it out")
        push = kwargs.pop("push_to_hub", False)
        names = [self._known(n) for n in selected_adapters or self.peft_config]
        for name in names:
            saving.save(self, name, Path(save_directory))
        if push:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        elif kwargs:
            raise ConfigError(f"save_pretrained got unknown arguments: {', '.join(kwargs)}")

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        ignore_fingerprint: bool = False,
    ) -> Self:
        """Attach a saved prompt to its base; PEFT's artifacts load as well.

        Args:
            model: The base the prompt was made for.
            model_id: Folder or Hub id.
            adapter_name: Name to give the prompt.
            is_trainable: Whether to train it further; otherwise it is frozen.
            subfolder: Folder of a named prompt inside ``model_id``.
            revision: Revision on the Hub.
            ignore_fingerprint: Attach to another base than the one it was made for.

        Raises:
            ArtifactError: If the files are missing or damaged.
            FingerprintError: If the base is another one.
        """
        stored = saving.read(model_id, subfolder, revision)
        target = (
            cls.classes.get(TaskType(stored.config.task_type), cls)
            if stored.config.task_type
            else cls
        )
        if cls is not PeftModel and target is not cls:
            raise ConfigError(
                f"{model_id} holds a prompt for task_type {stored.config.task_type}, "
                f"load it with {target.__name__}"
            )
        saving.check_base(stored, model, ignore_fingerprint)
        attached = target(model, stored.config, adapter_name)
        saving.fill(attached, adapter_name, stored, trainable=is_trainable)
        return cast(Self, attached)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        ignore_fingerprint: bool = False,
    ) -> None:
        """Attach one more saved prompt; see ``from_pretrained``."""
        stored = saving.read(model_id, subfolder, revision)
        saving.check_base(stored, self.base_model, ignore_fingerprint)
        self.add_adapter(adapter_name, stored.config)
        saving.fill(self, adapter_name, stored, trainable=is_trainable)

    # -- facts ------------------------------------------------------------------------------

    @property
    def task_type(self) -> TaskType:
        """The task of the first prompt, which all share."""
        first = next(iter(self.peft_config.values()), None)
        return (
            TaskType(first.task_type)
            if first is not None and first.task_type
            else infer_task(self.base_model)
        )

    @property
    def active_adapters(self) -> list[str]:
        """The active prompt, as a list."""
        return [self.active_adapter]

    @property
    def active_peft_config(self) -> PromptTuningConfig:
        """Configuration of the active prompt."""
        return self.peft_config[self.active_adapter]

    def get_base_model(self) -> PreTrainedModel:
        """Return the base model."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters train, and how many there are."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(  # noqa: T201 - the method's whole purpose
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters, prompts included, with transformers' arguments."""
        excluded = {id(p) for p in input_embedding(self.base_model).parameters()}
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(p) in excluded)
        )

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return a prompt's rows ``[P·S, H]`` on the CPU."""
        return self.encoder_of(self._known(adapter_name)).materialize().detach().cpu()

    def __getattr__(self, name: str) -> Any:
        """Look up what this module lacks on the base, as PEFT does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _completed(self, config: PeftConfig) -> PromptTuningConfig:
        """Check a configuration against the base and fill in what the base knows."""
        if not isinstance(config, PromptTuningConfig):
            raise ConfigError(f"expected a PromptTuningConfig, got a {type(config).__name__}")
        task = TaskType(config.task_type) if config.task_type else infer_task(self.base_model)
        if self.peft_config and task is not self.task_type:
            raise ConfigError(
                f"all prompts on one model share its task_type {self.task_type}, got {task}; "
                "attach the other task to a model of its own"
            )
        if (config.num_transformer_submodules or 1) != 1:
            raise ConfigError(
                f"num_transformer_submodules={config.num_transformer_submodules} adds rows that nothing "
                "reads; leave it out, the prompt stands before the (encoder's) input"
            )
        if self.task is not None and task is not self.task:
            raise ConfigError(f"{type(self).__name__} takes task_type {self.task}, got {task}")
        config = copy.copy(config)
        config.task_type = task
        config.num_transformer_submodules = 1
        if config.token_dim not in (None, self.facts.token_dim):
            raise ConfigError(
                f"token_dim is {config.token_dim}, but {self.facts.architecture}'s embeddings are "
                f"{self.facts.token_dim} wide; leave it out, or use the base the prompt was made for"
            )
        config.token_dim = self.facts.token_dim
        config.num_layers = config.num_layers or self.facts.num_layers
        config.num_attention_heads = config.num_attention_heads or self.facts.num_attention_heads
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = self.base_model.name_or_path or None
        own = RULES[task].heads
        if own:
            extra = [name for name in config.modules_to_save or [] if name not in own]
            config.modules_to_save = [*extra, *own]
        return config

    def _set_gradients(self) -> None:
        """Let the active prompt and its heads train, unless it was loaded frozen."""
        for name in self.peft_config:
            trains = name == self.active_adapter and name not in self._frozen
            self.prompt_encoder[name].requires_grad_(trains)
            for _, switch in heads.switches_of(self.base_model):
                if name in switch.modules_to_save:
                    switch.modules_to_save[name].requires_grad_(trains)

    def encoder_of(self, name: str) -> PromptEmbedding:
        """Return the trainable module of a prompt."""
        return cast(PromptEmbedding, self.prompt_encoder[name])

    def _known(self, name: str) -> str:
        if name not in self.peft_config:
            raise AdapterError(
                f"Adapter {name} not found.{nearest(name, self.peft_config)} "
                f"There are: {', '.join(self.peft_config)}"
            )
        return name


def _batch_size(inputs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[0])
    if inputs.get("encoder_outputs") is not None:
        return int(inputs["encoder_outputs"][0].shape[0])
    raise ConfigError("pass exactly one of input_ids and inputs_embeds")
