"""Named soft prompts on one frozen model, under PEFT's interface.

The base is never wrapped layer by layer: its input embedding carries a hook that is idle
except inside our own calls, and task heads are switched. ``unload`` takes both away.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.artifacts.manifest import Manifest
from softprompt.attach import heads, names, saving
from softprompt.attach.completion import completed
from softprompt.attach.counts import count, sentence
from softprompt.attach.embedding import PromptEmbedding
from softprompt.attach.generation import prompted_generation
from softprompt.attach.heads import BASE
from softprompt.attach.hub import upload
from softprompt.attach.inputs import (
    Call,
    batch_size,
    bound,
    named_input,
    prompted_pass,
)
from softprompt.attach.lending import lent, row_names
from softprompt.attach.tasks import RULES, infer_task
from softprompt.backbone.facts import Facts, facts_of, input_embedding
from softprompt.backbone.freeze import freeze
from softprompt.engine.layout import Prompts
from softprompt.engine.virtual import vocabulary_of
from softprompt.errors import AdapterError, ConfigError
from softprompt.prompts.configs import PeftConfig, PromptTuningConfig, TaskType


class PeftModel(nn.Module):
    """A frozen base with named prompts, ``prompt_encoder[name].embedding.weight``, float32 ``[P, H]``."""

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
        self.facts: Facts = facts_of(model)
        self._parameters_of_forward = tuple(inspect.signature(model.forward).parameters)
        self.add_adapter(adapter_name, peft_config)
        # Only now that nothing can be refused any more is the base touched.
        freeze(model)
        self._vocabulary = vocabulary_of(model)
        self.set_adapter(adapter_name)

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
        names.check_new(adapter_name, self.peft_config, self.prompt_encoder)
        config = completed(
            peft_config,
            self.base_model,
            self.facts,
            shared=next(iter(self.peft_config.values()), None),
            own=self.task,
        )
        optional = RULES[cast(TaskType, config.task_type)].heads
        paths = heads.find_heads(self.base_model, config.modules_to_save or [], optional=optional)
        heads.require_free(self.base_model, paths, adapter_name)
        encoder = PromptEmbedding(config, input_embedding(self.base_model), generator=generator)
        self.prompt_encoder[adapter_name] = encoder.to(self.base_model.device)
        self.peft_config[adapter_name] = config
        heads.add_heads(self.base_model, paths, adapter_name)
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
            raise AdapterError(f"{adapter_name!r} is the last prompt; unload() gives the base back")
        del self.peft_config[adapter_name]
        del self.prompt_encoder[adapter_name]
        self.manifests.pop(adapter_name, None)
        self._frozen.discard(adapter_name)
        heads.drop_heads(self.base_model, adapter_name)
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
        inputs = bound(self._parameters_of_forward, args, kwargs)
        with self._prompted(adapter_names, inputs) as prompts:
            if prompts is None:
                return self.base_model(**inputs)
            call = Call(inputs, prompts, self.facts, RULES[self.task_type])
            with prompted_pass(self.base_model, call) as prepared:
                return self.base_model(**prepared)

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
        kwargs = named_input(args, kwargs)
        kwargs.setdefault("generation_config", self.__dict__.get("generation_config"))
        with (
            torch.no_grad(),
            self._prompted(adapter_names, kwargs) as prompts,
            prompted_generation(self.base_model, self.facts, prompts, kwargs) as prepared,
        ):
            return cast(Any, self.base_model).generate(*args[1:], **prepared)

    def _prompted(
        self, chosen: Sequence[str] | None, inputs: dict[str, Any]
    ) -> AbstractContextManager[Prompts | None]:
        """Lend each row its prompt; no row has one while adapters are disabled."""
        batch = batch_size(inputs)
        rows = [BASE] * batch if self._disabled else row_names(chosen, self.active_adapter, batch)
        return lent(
            self.base_model,
            self._vocabulary,
            rows,
            lambda name: self.encoder_of(name).materialize(),
            self.active_peft_config.prompt_sees_input,
        )

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
        if kwargs and not push:
            raise ConfigError(f"save_pretrained got unknown arguments: {', '.join(kwargs)}")
        for name in [self._known(n) for n in selected_adapters or self.peft_config]:
            saving.save(self, name, Path(save_directory))
        if push:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save all prompts into a Hub repository, made if needed, and return the commit's address.

        Args:
            repo_id: Such as ``someone/prompt``.
            **options: ``commit_message``, ``private``, ``token``, ``revision``, ``create_pr``.

        Raises:
            ArtifactError: If the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repo_id, **options)

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
        target = cls.classes.get(cast(TaskType, stored.config.task_type), cls)
        if cls is not PeftModel and target is not cls:
            raise ConfigError(
                f"{model_id} holds a prompt for task_type {stored.config.task_type}, "
                f"load it with {target.__name__}"
            )
        saving.check_base(stored, model, ignore_fingerprint)
        attached = target(model, stored.config, adapter_name)
        try:
            saving.fill(attached, adapter_name, stored, trainable=is_trainable)
        except Exception:
            attached.unload()
            raise
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
        try:
            saving.fill(self, adapter_name, stored, trainable=is_trainable)
        except Exception:
            self.delete_adapter(adapter_name)
            raise

    @property
    def task_type(self) -> TaskType:
        """The task of the first prompt, which all share."""
        first = next(iter(self.peft_config.values()), None)
        return cast(TaskType, first.task_type) if first else infer_task(self.base_model)

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
        return count(self, trainable=True), count(self, trainable=False)

    def print_trainable_parameters(self) -> None:
        """Print the counts in PEFT's words."""
        print(sentence(*self.get_nb_trainable_parameters()))  # noqa: T201 - its whole purpose

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters, prompts included, with transformers' arguments."""
        table = input_embedding(self.base_model).parameters() if exclude_embeddings else ()
        return count(self, trainable=only_trainable, without=list(table))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return a prompt's rows ``[P·S, H]`` on the CPU."""
        return self.encoder_of(adapter_name).materialize().detach().cpu()

    def __getattr__(self, name: str) -> Any:
        """Look up what this module lacks on the base, as PEFT does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _set_gradients(self) -> None:
        """Let the active prompt and its heads train, unless it was loaded frozen."""
        for name in self.peft_config:
            trains = name == self.active_adapter and name not in self._frozen
            self.prompt_encoder[name].requires_grad_(trains)
            for _, head in heads.heads_of(self.base_model, name):
                head.requires_grad_(trains)

    def encoder_of(self, name: str) -> PromptEmbedding:
        """Return the trainable module of a prompt.

        Raises:
            AdapterError: If there is no such prompt.
        """
        return cast(PromptEmbedding, self.prompt_encoder[self._known(name)])

    def _known(self, name: str) -> str:
        return names.known(name, self.peft_config)
