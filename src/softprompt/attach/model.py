"""Named soft prompts on one frozen model, under PEFT's interface: calls, files and counts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.artifacts import check_base
from softprompt.attach import saving
from softprompt.attach.adapters import Adapters
from softprompt.attach.choosing import RowPrompt, TaskIds, chosen_rows
from softprompt.attach.completion import sees_input_of
from softprompt.attach.context_loss import without_context_labels
from softprompt.attach.counts import count, sentence
from softprompt.attach.decoder import decoder_inputs
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
from softprompt.attach.lending import LentPrompts, PromptParts, lent
from softprompt.attach.parts import split_value
from softprompt.attach.placing import PromptAt, prompt_offsets
from softprompt.attach.prefixes import check_prefixed
from softprompt.attach.tasks import RULES, infer_task
from softprompt.backbone import input_embedding
from softprompt.errors import ConfigError
from softprompt.prompts import PROMPT_KEY, CPTEmbedding, PeftType, PromptLearningConfig, TaskType


class PeftModel(Adapters):
    """A frozen base with named prompts, ``prompt_encoder[name]``, whose ``materialize()`` gives the rows.

    Rows that are trained themselves are its ``embedding.weight``, float32 ``[P, H]``; a parameterised
    prompt has other parameters in their place until its rows are loaded.
    """

    classes: ClassVar[dict[TaskType, type[PeftModel]]] = {}

    def __init_subclass__(cls, task: TaskType) -> None:
        """Register the class of a task type."""
        super().__init_subclass__()
        cls.task = task
        PeftModel.classes[task] = cls

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: TaskIds | None = None,
        prompt_at: PromptAt | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base on prompted inputs; outputs cover P + T columns, text behind the prompt at P + t.

        Args:
            *args: The base's positional arguments.
            adapter_names: A prompt for each row, ``__base__`` for none; None is the active one.
            task_ids: The task of each row, ``[B]``, for multitask prompts.
            prompt_at: Real tokens of each row before its prompt, ``[B]``; None follows the placement.
            **kwargs: The base's keyword arguments; masks and labels cover the text alone.

        Raises:
            AdapterError: For an unknown name, or not one name a row.
            ConfigError: If the arguments do not fit together.
            ContextOverflowError: If prompt and input exceed the model's context.
        """
        inputs = bound(self._arguments_of_forward, args, kwargs)
        rows = self._rows(inputs, adapter_names, task_ids)
        names = [row.name for row in rows]
        inputs, context = without_context_labels(inputs, names, self.peft_config)
        with self._prompted(rows, inputs, prompt_at) as prompts:
            if prompts.decoder is not None:
                inputs = decoder_inputs(self.base_model, self.facts, prompts.decoder, inputs)
            check_prefixed(self.base_model, self.facts, prompts.prefixes, inputs)
            if prompts.input is None:
                return self.base_model(**inputs)
            call = Call(inputs, prompts.input, self.facts, RULES[self.task_type])
            with prompted_pass(self.base_model, call) as (prepared, layout):
                outputs = self.base_model(**prepared)
            return outputs if context is None else context.scored(outputs, layout)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: TaskIds | None = None,
        prompt_at: PromptAt | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with transformers' ``generate``; sequences hold no virtual tokens.

        Args:
            *args: At most the input ids, as transformers takes them.
            adapter_names: A prompt for each input row, ``__base__`` for none.
            task_ids: The task of each input row, ``[B]``, for multitask prompts.
            prompt_at: Real tokens of each row before its prompt, ``[B]``; None follows the placement.
            **kwargs: What ``generate`` of the base takes; lengths count text tokens.

        Raises:
            AdapterError: For an unknown name, or not one name a row.
            ConfigError: For speculative decoding.
            ContextOverflowError: If prompt, input and new tokens cannot fit.
        """
        kwargs = named_input(args, kwargs)
        kwargs.setdefault("generation_config", self.__dict__.get("generation_config"))
        rows = self._rows(kwargs, adapter_names, task_ids)
        with (
            torch.no_grad(),
            self._prompted(rows, kwargs, prompt_at) as prompts,
            prompted_generation(self.base_model, self.facts, prompts, kwargs) as prepared,
        ):
            return cast(Any, self.base_model).generate(*args[1:], **prepared)

    def _rows(
        self, inputs: dict[str, Any], chosen: Sequence[str] | None, task_ids: TaskIds | None
    ) -> list[RowPrompt]:
        """Return each row's prompt; none while adapters are disabled."""
        batch = batch_size(inputs)
        # Disabled, a call is the base's, which nobody tells a task.
        needless = self._disabled and task_ids is None
        rows = chosen_rows(
            chosen,
            task_ids,
            active=self.active_adapter,
            batch=batch,
            tasks_of=(lambda name: self._tasks_of(name) and 1) if needless else self._tasks_of,
        )
        return [RowPrompt(BASE)] * batch if self._disabled else rows

    def _tasks_of(self, name: str) -> int | None:
        multitask = (
            self.peft_config[self._known(name)].peft_type is PeftType.MULTITASK_PROMPT_TUNING
        )
        return self.encoder_of(name).num_tasks if multitask else None

    def _prompted(
        self, rows: Sequence[RowPrompt], inputs: dict[str, Any], prompt_at: PromptAt | None
    ) -> AbstractContextManager[LentPrompts]:
        """Lend each row its prompt for a call."""
        at = prompt_offsets(self.base_model, rows, self.peft_config, inputs, prompt_at)
        sees_input = sees_input_of(self.active_peft_config)
        prompts = LentPrompts.of(rows, self.parts_of, sees_input=sees_input, at=at)
        return lent(self.base_model, self.facts, self._vocabulary, rows, prompts)

    def parts_of(self, row: RowPrompt) -> PromptParts:
        """Return the value of a prompt by where it goes, with gradients."""
        encoder = self.encoder_of(row.name)
        if isinstance(encoder, CPTEmbedding) and torch.is_grad_enabled():
            encoder.project_()
        value = encoder.materialize(row.task)
        return split_value(value, self.peft_config[row.name], self.facts)

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
        check_base(stored.manifest, stored.location, model, ignore=ignore_fingerprint)
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
        check_base(stored.manifest, stored.location, self.base_model, ignore=ignore_fingerprint)
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
    def active_peft_config(self) -> PromptLearningConfig:
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
        """Return the value that is saved, baked: ``[S·P, H]`` on the CPU."""
        return self.encoder_of(adapter_name).stored()[PROMPT_KEY]

    def __getattr__(self, name: str) -> Any:
        """Look up what this module lacks on the base, as PEFT does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)
