"""Prompts for a batcher, without being attached: kinds that no one model takes meet there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts import Manifest, StoredPrompt, manifest_of_task
from softprompt.attach import detached_prompts, placement_of
from softprompt.backbone import Base
from softprompt.data import RowTokenizer
from softprompt.inference.requests import row_tokenizer
from softprompt.inference.stored import record_of
from softprompt.inference.task_choice import Task, task_number
from softprompt.inference.tuned import TunedPrompt
from softprompt.prompts import Prompt


@dataclass(frozen=True, slots=True)
class DetachedTask:
    """A prompt as it is used for one of its tasks.

    Attributes:
        prompt: What requests carry.
        rows: Turns fields into token ids the way the prompt was trained.
        manifest: Its record for this task.
    """

    prompt: Prompt
    rows: RowTokenizer
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class DetachedPrompt:
    """A prompt with all its tasks, beside a base that does not know of it.

    Attributes:
        model: The base.
        tokenizer: The base's.
        manifest: The record of the whole.
        tasks: One for each task, by its number.
        task: The task that is meant where none is named.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest
    tasks: Sequence[DetachedTask]
    task: int | None = None

    @classmethod
    def of(cls, tuned: TunedPrompt) -> DetachedPrompt:
        """Return what an attached prompt is now.

        Raises:
            ConfigError: It has a head of its own.
        """
        tuned.check_served()
        every = [tuned.of_task(number) for number in range(len(tuned.task_names))]
        tasks = [DetachedTask(own.prompt(), own.rows, own.manifest) for own in every]
        base = tuned.model.get_base_model()
        return cls(base, tuned.tokenizer, tuned.whole, tasks, tuned.task)

    @classmethod
    def of_stored(
        cls, stored: StoredPrompt, base: Base, *, ignore_fingerprint: bool = False
    ) -> DetachedPrompt:
        """Return what a saved prompt is; the base is read and not changed.

        Args:
            stored: What was read from disk.
            base: The base it is for.
            ignore_fingerprint: Take a prompt that was made for another base.

        Raises:
            SoftPromptError: It cannot be used with this base.
        """
        whole = record_of(stored, base)
        config, prompts = detached_prompts(
            stored, base.model, ignore_fingerprint=ignore_fingerprint
        )
        tasks = []
        for number, prompt in enumerate(prompts):
            own = manifest_of_task(whole, number)
            rows = row_tokenizer(base.tokenizer, own, placement_of(config))
            tasks.append(DetachedTask(prompt, rows, own))
        return cls(base.model, base.tokenizer, whole, tasks)

    def of_task(self, task: Task | None) -> DetachedTask:
        """Return the prompt for one task; None will do where there is one, or one was chosen.

        Raises:
            ConfigError: There is no such task, or none is named where there are several.
        """
        if task is None and self.task is not None:
            return self.tasks[self.task]
        return self.tasks[task_number(task, self.manifest, len(self.tasks))]
