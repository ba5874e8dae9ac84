"""A soft prompt with its frozen base model, tokenizer, template and label set: generate, classify, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, final, overload

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt.artifacts import Manifest, manifest_of_task, save_adapter
from softprompt.attach import (
    BASE,
    PeftModel,
    heads_of,
    placement_of,
    state_of,
)
from softprompt.backbone import Base
from softprompt.engine import Engine, build_engine
from softprompt.errors import ConfigError
from softprompt.inference.continuous.request import request_of
from softprompt.inference.continuous.streaming import streamed
from softprompt.inference.generation import Generation, Generator
from softprompt.inference.options import GenerationOptions, options_from
from softprompt.inference.requests import Request, inputs_of, listed, row_tokenizer, sources_of
from softprompt.inference.scoring import (
    LabelScores,
    label_ids_of,
    label_scores,
    label_set,
    score_labels,
)
from softprompt.inference.task_choice import Task, TaskNames, rows_by_task, task_number
from softprompt.prompts import Placement, Prompt

_Answer = TypeVar("_Answer")


@final
class TunedPrompt:
    """What ``tune`` returns and ``load`` reads: call it with a text to get the answer.

    Attributes:
        model: The base model with the prompt attached.
        tokenizer: The base model's tokenizer.
        manifest: Template, label set, limits and provenance of the prompt.
        adapter: Name of the prompt on the model.
        task: The task of a multitask prompt it is used for; None before one is chosen.
        rows: Turns fields into token ids the way the prompt was trained.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        manifest: Manifest,
        adapter: str = "default",
        *,
        task: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.whole = manifest
        self.task = task
        self.manifest = manifest = manifest_of_task(manifest, task or 0)
        self.adapter = adapter
        self.rows = row_tokenizer(tokenizer, manifest, placement_of(model.peft_config[adapter]))

    def of_task(self, task: Task | None) -> TunedPrompt:
        """Return this prompt as used for one task, with that task's template and label set.

        Args:
            task: Name or number; None will do for a prompt with one task.

        Raises:
            ConfigError: There is no such task, or None was given and there are several.
        """
        if task is None and self.task is not None:
            return self
        count = self.model.encoder_of(self.adapter).num_tasks
        number = task_number(task, self.whole, count)
        return TunedPrompt(self.model, self.tokenizer, self.whole, self.adapter, task=number)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of its tasks; their numbers where it has no names."""
        count = self.model.encoder_of(self.adapter).num_tasks
        return self.whole.tasks or tuple(map(str, range(count)))

    def rows_of_tasks(self, chosen: TaskNames, rows: int) -> dict[int, list[int]]:
        """Return the inputs of each task, by its number, for one task or one of each input.

        Raises:
            ConfigError: There is no such task, or not one for each input.
        """
        count = self.model.encoder_of(self.adapter).num_tasks
        return rows_by_task(chosen, self.whole, count, rows)

    def _of_tasks(
        self,
        requests: Request | Iterable[Request],
        chosen: TaskNames,
        answer: Callable[[TunedPrompt, list[Request]], list[_Answer]],
    ) -> list[_Answer]:
        """Return the answers to all requests in their order, those of one task given together."""
        given = listed(requests)
        found: dict[int, _Answer] = {}
        for task, numbers in self.rows_of_tasks(chosen, len(given)).items():
            answers = answer(self.of_task(task), [given[number] for number in numbers])
            found.update(zip(numbers, answers, strict=True))
        return [found[number] for number in range(len(given))]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics recorded when the prompt was made."""
        return self.manifest.metrics

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """One point for each epoch of training."""
        return self.manifest.history

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The label set; None for a prompt that generates free text."""
        return self.manifest.labels

    @cached_property
    def engine(self) -> Engine:
        """The fastest exact engine that scores targets over the base model."""
        return self.engine_of("auto")

    def engine_of(self, kind: str) -> Engine:
        """Return an engine over the base model by its name.

        Raises:
            ConfigError: There is no such engine, or it does not run this model exactly.
        """
        return build_engine(Base.of(self.model.get_base_model()), kind)

    def prompt(self) -> Prompt:
        """Return the prompt as it is now: detached, and with memory of its own.

        Raises:
            ConfigError: The prompt has several tasks, and none is chosen.
        """
        encoder = self.model.encoder_of(self.adapter)
        task = task_number(self.task, self.whole, encoder.num_tasks)
        return encoder.prompt(task).detach().map(Tensor.clone)

    def check_served(self) -> None:
        """Refuse a prompt that is more than virtual tokens before its base.

        Raises:
            ConfigError: It has a head of its own.
        """
        head = next(heads_of(self.model.get_base_model(), self.adapter), None)
        if head is not None:
            raise ConfigError(
                f"prompt {self.adapter!r} has its own {head[0]}, and only the base's is served; use generate"
            )

    # A str is iterable too; the first overload is the one meant.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, requests: Request, *, task_name: TaskNames | None = None
    ) -> str: ...

    @overload
    def __call__(
        self, requests: Iterable[Request], *, task_name: TaskNames | None = None
    ) -> list[str]: ...

    def __call__(
        self, requests: Request | Iterable[Request], *, task_name: TaskNames | None = None
    ) -> str | list[str]:
        """Return the best label, or the generated text, of one input or of each in a list.

        Args:
            requests: One input or several: texts, or mappings of the template's fields.
            task_name: The task of a multitask prompt, by name or number; or one for each input.

        Raises:
            TemplateError: An input does not have the template's fields.
        """
        answers: list[str]
        if task_name is not None:
            answers = self._of_tasks(requests, task_name, lambda own, part: own(part))
        elif self.manifest.task == "classification":
            answers = [each.label for each in self.classify(requests)]
        else:
            limit = self.manifest.max_target_length
            answers = [each.text for each in self.generate(requests, max_new_tokens=limit)]
        return answers[0] if isinstance(requests, str | Mapping) else answers

    def classify(
        self,
        requests: Request | Iterable[Request],
        labels: Sequence[str] | None = None,
        *,
        task_name: TaskNames | None = None,
        normalize: bool = False,
        batch_size: int = 64,
    ) -> list[LabelScores]:
        """Return how likely each label is as the answer to each input.

        Args:
            requests: One input or several: texts, or mappings of the template's fields.
            labels: Label set; None takes the one recorded with the prompt.
            task_name: The task of a multitask prompt, by name or number; or one for each input.
            normalize: Divide a label's log-probability by its token count.
            batch_size: (input, label) pairs in one pass, at most.

        Raises:
            ConfigError: There is no label set, or two labels have the same tokens.
            TemplateError: An input does not have the template's fields.
            ContextOverflowError: Prompt, input and label exceed the model's context.
        """
        if task_name is not None:
            return self._of_tasks(
                requests,
                task_name,
                lambda own, part: own.classify(
                    part, labels, normalize=normalize, batch_size=batch_size
                ),
            )
        prompt = self.prompt()
        names = label_set(labels, self.labels)
        if names is None:
            raise ConfigError(
                "this prompt generates free text and has no label set; pass labels=[...] or "
                "call generate"
            )
        label_ids = self.label_ids(names)
        sources, cut = self.sources(requests)
        scores = score_labels(
            self.engine,
            prompt,
            sources,
            label_ids,
            offsets=[self.rows.offset(source) for source in sources],
            batch_size=batch_size,
            normalize=normalize,
        )
        return label_scores(names, scores, cut)

    def generate(
        self,
        requests: Request | Iterable[Request],
        *,
        task_name: TaskNames | None = None,
        options: GenerationOptions | None = None,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[Generation]:
        """Return one generated answer for each input.

        Args:
            requests: One input or several: texts, or mappings of the template's fields.
            task_name: The task of a multitask prompt, by name or number; or one for each input.
            options: How to generate; or name its fields as ``settings``.
            batch_size: Rows in one call of the model.
            **settings: Fields of ``GenerationOptions``, such as ``max_new_tokens=20``.

        Raises:
            ConfigError: An option is unknown, out of range, or would be ignored.
            TemplateError: An input does not have the template's fields.
            ContextOverflowError: Prompt, input and answer exceed the model's context.
        """
        if task_name is not None:
            return self._of_tasks(
                requests,
                task_name,
                lambda own, part: own.generate(
                    part, options=options, batch_size=batch_size, **settings
                ),
            )
        chosen = options_from(options, settings, "generate")
        sources, cut = self.sources(requests)
        return self.generate_rows(sources, chosen, batch_size=batch_size, cut=cut)

    def stream(
        self,
        request: Request,
        *,
        task_name: Task | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yield the generated answer to one input piece by piece; together they are ``generate``'s text.

        Args:
            request: A text, or a mapping of the template's fields.
            task_name: The task of a multitask prompt, by name or number.
            options: How to generate; or name its fields as ``settings``.
            **settings: Fields of ``GenerationOptions``.

        Raises:
            SoftPromptError: As ``generate``; or for beams, which cannot be streamed.
        """
        tuned = self.of_task(task_name)
        chosen = options_from(options, settings, "stream")
        (given,) = inputs_of(tuned.rows, [request])
        tuned.check_served()
        queued = request_of(given, tuned.prompt(), options=chosen)
        return streamed(self.model.get_base_model(), self.tokenizer, queued)

    def generate_rows(
        self,
        sources: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int = 16,
        cut: Sequence[bool] | None = None,
        without_prompt: bool = False,
    ) -> list[Generation]:
        """Return one generated answer for each row of token ids; see ``generate``."""
        count = self.model.encoder_of(self.adapter).num_tasks
        task = task_number(self.task, self.whole, count)
        inside = self.rows.placement is not Placement.PREFIX
        generator = Generator.of(
            self.model,
            self.tokenizer,
            self.rows.decode,
            adapter=BASE if without_prompt else self.adapter,
            task=task if count > 1 and not without_prompt else None,
            offset=self.rows.offset if inside and not without_prompt else None,
        )
        return generator.answers(sources, options, batch_size=batch_size, cut=cut)

    def sources(
        self, requests: Request | Iterable[Request]
    ) -> tuple[list[tuple[int, ...]], list[bool]]:
        """Return the text tokens of each input, and whether it lost its end.

        Raises:
            TemplateError: An input does not have the template's fields.
            DataError: An input has no tokens.
        """
        return sources_of(self.rows, requests)

    def label_ids(self, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the tokens of each label.

        Raises:
            ConfigError: There is no label, or two labels have the same tokens.
        """
        return label_ids_of(self.rows, labels)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the prompt as PEFT's folder with ``softprompt.json`` and a model card.

        Raises:
            OutputExistsError: The directory is not empty and ``overwrite`` is off.
        """
        config = replace(self.model.peft_config[self.adapter], inference_mode=True)
        save_adapter(
            Path(directory),
            config.to_dict(),
            state_of(self.model, self.adapter),
            self.whole,
            overwrite=overwrite,
        )
