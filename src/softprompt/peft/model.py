"""Named soft prompts on one frozen model, under PEFT's interface: its calls and its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.engine import TASK_RULES, BatchPrompts, generate_with_prompts, prefix_path, require_isolated
from softprompt.errors import ConfigError, InterfaceError
from softprompt.peft import loading, saving
from softprompt.peft.adapters import BASE, LoadResult, active_heads
from softprompt.peft.inputs import (
    Call,
    batch_size,
    bound,
    check_prefixed,
    decoder_inputs,
    prompted_pass,
    with_columns,
)
from softprompt.peft.rows import (
    ContextLabels,
    PromptAt,
    RowPrompt,
    TaskIds,
    chosen_rows,
    prompt_offsets,
    without_context_labels,
)
from softprompt.peft.status import StatusOfAdapters
from softprompt.peft.training_loss import check_gradient, training_output, trains
from softprompt.prompts import CPTEmbedding, PeftConfig, PeftType, Prompt, TaskType

if TYPE_CHECKING:
    from softprompt.inference import TunedPrompt

_GENERATE = ("inputs", "generation_config", "logits_processor", "stopping_criteria")
"""First parameters of transformers' ``generate``, in order."""

_GENERATES = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)


class PeftModel(StatusOfAdapters):
    """A frozen base with named prompts, ``prompt_encoder[name]``, whose ``prompt()`` gives the virtual tokens.

    Virtual tokens that are trained themselves are its ``embedding.weight``, float32 ``[P, H]``; a
    parameterised prompt has other parameters instead, until a saved value is loaded.
    """

    classes: ClassVar[dict[TaskType, type[PeftModel]]] = {}

    def __init_subclass__(cls, task: TaskType | None = None) -> None:
        """Register the class of a task type."""
        super().__init_subclass__()
        if task is not None:
            cls.task = task
            cls.forward = with_columns(cls.forward, task)  # type: ignore[method-assign]
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
            TrainingError: At the first training call, if the base does not pass on the prompts' gradient.
        """
        inputs = bound(self._arguments_of_forward, args, kwargs, what="forward")
        rows = self._rows(inputs, adapter_names, task_ids)
        inputs, context = without_context_labels(inputs, [row.name for row in rows], self.peft_config)
        at = prompt_offsets(self.base_model, rows, self.peft_config, inputs, prompt_at)
        prompts = self._prompts_of(rows)
        base, run = self.base, partial(self._padded, at=at, context=context)

        def again(inputs: dict[str, Any]) -> Any:
            with self._ready(rows):
                return run(inputs, prompts)

        with self._ready(rows):
            if self.training and trains(prompts):
                engine = self.task_type in _GENERATES and context is None and not self._heads
                check_gradient(base, prompts, at, inputs, run, causal=engine and not base.is_encoder_decoder)
                outputs = training_output(base, prompts, at, inputs, again) if engine else None
                if outputs is not None:
                    return outputs
            return run(inputs, prompts)

    def _padded(
        self,
        inputs: dict[str, Any],
        prompts: Sequence[Prompt | None],
        *,
        at: Sequence[int] | None,
        context: ContextLabels | None,
    ) -> Any:
        """Return the base's outputs for padded rows behind their prompts, in ``_ready``."""
        batch = BatchPrompts.of(prompts, at=at)
        with batch.injected(self.base, self._vocabulary):
            if batch.decoder is not None:
                inputs = decoder_inputs(self.base, batch.decoder, inputs)
            if batch.prefixes is not None:
                check_prefixed(self.base, batch.prefixes, inputs)
            if batch.input is None:
                return self.base_model(**inputs)
            rules = TASK_RULES[self.task_type]
            call = Call(self.base, self.facts, inputs, batch.input, rules)
            with prompted_pass(call) as (prepared, layout):
                outputs = self.base_model(**prepared)
            return outputs if context is None else context.scored(outputs, layout)

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: TaskIds | None = None,
        prompt_at: PromptAt | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with transformers' ``generate`` and its arguments; sequences hold no virtual tokens.

        Rows get their prompts, tasks and offsets as in ``forward``; lengths count text tokens.

        Raises:
            AdapterError: For an unknown name, or not one name a row.
            ConfigError: For arguments that do not go with the prompts.
            ContextOverflowError: If prompt, input and new tokens cannot fit.
        """
        inputs = bound(_GENERATE, args, kwargs, what="generate")
        given = inputs.pop("inputs", None)
        if given is not None:
            inputs["input_ids"] = given
        inputs.setdefault("generation_config", self.__dict__.get("generation_config"))
        rows = self._rows(inputs, adapter_names, task_ids)
        at = prompt_offsets(self.base_model, rows, self.peft_config, inputs, prompt_at)
        prompts = self._prompts_of(rows)
        with self._ready(rows):
            return generate_with_prompts(self.base, prompts, inputs, at=at, vocabulary=self._vocabulary)

    def _rows(
        self, inputs: dict[str, Any], chosen: Sequence[str] | None, task_ids: TaskIds | None
    ) -> list[RowPrompt]:
        """Return each row's prompt; none while adapters are disabled."""
        batch = batch_size(inputs)
        # Disabled, a call is the base's, which takes no task.
        needless = self._disabled and task_ids is None
        rows = chosen_rows(
            chosen,
            task_ids,
            active=self.active_adapter,
            batch=batch,
            tasks_of=(lambda name: None if self._known(name) else 0) if needless else self._tasks_of,
        )
        return [RowPrompt(BASE)] * batch if self._disabled else rows

    def _tasks_of(self, name: str) -> int | None:
        multitask = self.peft_config[self._known(name)].peft_type is PeftType.MULTITASK_PROMPT_TUNING
        return self.encoder_of(name).num_tasks if multitask else None

    def _prompts_of(self, rows: Sequence[RowPrompt]) -> list[Prompt | None]:
        """Return the prompt of each row, with gradients, one object for rows with the same."""
        made = {row: self._prompt_of(row) for row in dict.fromkeys(rows) if row.name != BASE}
        return [made.get(row) for row in rows]

    def _prompt_of(self, row: RowPrompt) -> Prompt:
        encoder = self.encoder_of(row.name)
        if isinstance(encoder, CPTEmbedding) and torch.is_grad_enabled():
            encoder.project_()
        return encoder.prompt(row.task)

    @contextmanager
    def _ready(self, rows: Sequence[RowPrompt]) -> Iterator[None]:
        """Run each row's heads inside the context, which holds the base's lock.

        Raises:
            ConfigError: If the embedding table was resized since the prompts were attached.
        """
        size = self.base.embedding.weight.shape[0]
        if size != self._vocabulary.size:
            raise ConfigError(
                f"the embedding table had {self._vocabulary.size:,} rows when the prompts were attached, now it "
                f"has {size:,}; resize it first, then attach"
            )
        base, names = self.base, [row.name for row in rows]
        for config in (self.peft_config[name] for name in dict.fromkeys(names) if name != BASE):
            # These probes run other rows, so before these rows' heads are active.
            require_isolated(config, base)
            if config.keys_and_values:
                prefix_path(base)
        with base.lock, active_heads(self.base_model, names) if self._heads else nullcontext():
            yield

    @property
    def _heads(self) -> bool:
        """Whether modules of the base have trained copies."""
        return any(config.modules_to_save for config in self.peft_config.values())

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write prompts in PEFT's layout: ``default`` into the folder, others into ``<folder>/<name>/``.

        Args:
            save_directory: Made if needed; a prompt already there is replaced, as in PEFT.
            safe_serialization: False writes ``adapter_model.bin``, a pickle, in place of safetensors.
            selected_adapters: Names to save; None saves all.
            save_embedding_layers: See ``get_peft_model_state_dict``.
            is_main_process: Whether to write at all; False is for the other processes of a run.
            path_initial_model_for_weight_conversion: Must stay None: it turns LoRA into LoRA.
            state_dict: Values to write instead; see ``get_peft_model_state_dict``.
            **kwargs: ``push_to_hub=True`` and its arguments; ``save_function`` and ``max_shard_size`` of
                transformers, which change nothing.

        Raises:
            AdapterError: For an unknown name.
            ArtifactError: If the files cannot be written.
            ConfigError: For arguments that do not exist, or cannot be followed.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise InterfaceError(
                "path_initial_model_for_weight_conversion converts LoRA, not prompts; leave it out"
            )
        push = kwargs.pop("push_to_hub", False)
        for name in ("save_function", "max_shard_size"):
            kwargs.pop(name, None)
        if kwargs and not push:
            raise ConfigError(f"save_pretrained got unknown arguments: {', '.join(kwargs)}")
        for name in [self._known(n) for n in selected_adapters or self.peft_config]:
            if is_main_process:
                how: dict[str, Any] = {"pickled": not safe_serialization, "embeddings": save_embedding_layers}
                saving.save(self, name, Path(save_directory), state_dict=state_dict, **how)
        if push and is_main_process:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save all prompts into a Hub repository, made if needed, and return the commit's address.

        Args:
            repo_id: Such as ``someone/prompt``.
            **options: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``,
                ``create_pr``, and ``tags`` of the card; others are ``save_pretrained``'s.

        Raises:
            ArtifactError: If the Hub refuses or cannot be reached.
        """
        return saving.push(self, repo_id, **options)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write ``README.md`` for the active prompt, or name library and base in the one that is there."""
        saving.write_card(self, Path(output_dir))

    @classmethod
    def of(cls, tuned: TunedPrompt, adapter_name: str = "default") -> PeftModel:
        """Return a tuned prompt as a module on its base, which shares its parameters and is not a copy.

        Raises:
            ConfigError: If the base has no class for the prompt's task.
        """
        task = cast(TaskType, tuned.config.task_type)
        attached = cls.classes[task](
            tuned.base.model, tuned.config, adapter_name, module=tuned.module, trained_heads=tuned.heads
        )
        attached.manifests[adapter_name] = tuned.whole
        return attached

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Attach a saved prompt to its base; PEFT's artifacts load as well.

        Args:
            model: The base the prompt was made for.
            model_id: Folder or Hub id.
            adapter_name: Name to give the prompt.
            is_trainable: Whether to train it further; otherwise it is frozen.
            config: Configuration to use in place of the file's.
            autocast_adapter_dtype: Changes nothing, as the next two: a prompt is float32 and small.
            ephemeral_gpu_offload: See above.
            low_cpu_mem_usage: See above.
            key_mapping: Replacements by the pattern of the names of trained modules that they apply to.
            **kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir`` ... of the download; ``torch_device`` or
                ``device_map`` for where the prompt goes, with ``max_memory`` and ``offload_folder`` where the
                base goes; ``ignore_fingerprint=True`` attaches to another base than the one it was made for.

        Raises:
            ArtifactError: If the files are missing or damaged.
            FingerprintError: If the base is another one.
        """
        how = loading.Loading.of(
            {**kwargs, "key_mapping": key_mapping, "ephemeral_gpu_offload": ephemeral_gpu_offload}
        )
        made = loading.attached(
            cls, model, model_id, adapter_name, trainable=is_trainable, config=config, loading=how
        )
        return cast(Self, made)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Attach one more saved prompt, or load it into the one of that name; see ``from_pretrained``."""
        options = {"torch_device": torch_device, "key_mapping": key_mapping}
        how = loading.Loading.of({**kwargs, **options, "ephemeral_gpu_offload": ephemeral_gpu_offload})
        return loading.attach_another(self, model_id, adapter_name, trainable=is_trainable, loading=how)
