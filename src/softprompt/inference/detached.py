"""Saved prompts ready for a batcher without being attached: kinds that no one model takes meet there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt.artifacts.manifest import Manifest, manifest_of_task
from softprompt.artifacts.native import StoredAdapter
from softprompt.attach.completion import sees_input_of
from softprompt.attach.detached import prompt_values
from softprompt.attach.parts import split_value
from softprompt.attach.placing import placement_of
from softprompt.attach.saving import in_our_terms
from softprompt.backbone.facts import facts_of
from softprompt.backbone.load import LoadedBase
from softprompt.data.template import Verbalizer
from softprompt.data.tokens import RowTokenizer
from softprompt.inference.continuous.request import PromptValue
from softprompt.inference.continuous.values import content_key, prompt_value
from softprompt.inference.task_choice import Task, task_number
from softprompt.inference.tuned import TunedPrompt


@dataclass(frozen=True, slots=True)
class DetachedTask:
    """A prompt as it is used for one of its tasks.

    Attributes:
        value: What requests carry.
        rows: Turns fields into token ids the way the prompt was trained.
        manifest: Its record for this task.
    """

    value: PromptValue
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
            ConfigError: It has a head of its own beside its rows.
        """
        every = [tuned.of_task(number) for number in range(len(tuned.task_names))]
        tasks = [DetachedTask(prompt_value(own), own.rows, own.manifest) for own in every]
        base = tuned.model.get_base_model()
        return cls(base, tuned.tokenizer, tuned.whole, tasks, tuned.task)

    def of_task(self, task: Task | None) -> DetachedTask:
        """Return the prompt for one task; None will do where there is one, or one was chosen.

        Raises:
            ConfigError: There is no such task, or none is named where there are several.
        """
        if task is None and self.task is not None:
            return self.tasks[self.task]
        return self.tasks[task_number(task, self.manifest, len(self.tasks))]


def detached_tasks(
    stored: StoredAdapter,
    base: LoadedBase,
    manifest: Manifest,
    *,
    ignore_fingerprint: bool = False,
) -> tuple[DetachedTask, ...]:
    """Return a saved prompt for each of its tasks; the base is read and not changed.

    Args:
        stored: What was read from disk.
        base: The base it is for.
        manifest: Its record, or what stands in for one.
        ignore_fingerprint: Take a prompt that was made for another base.

    Raises:
        SoftPromptError: It cannot be used with this base.
    """
    facts = facts_of(base.model)
    config, values = prompt_values(
        in_our_terms(stored), base.model, ignore_fingerprint=ignore_fingerprint
    )
    sees_input = sees_input_of(config)
    tasks = []
    for number, value in enumerate(values):
        own = manifest_of_task(manifest, number)
        rows = RowTokenizer(
            base.tokenizer,
            Verbalizer(own.template),
            max_source_length=own.max_source_length,
            max_target_length=own.max_target_length,
            seq2seq=facts.is_encoder_decoder,
            placement=placement_of(config),
        )
        parts = split_value(value, config, facts)
        standing = parts.input if parts.prefix is None else parts.prefix
        key = content_key(standing, parts.decoder, sees_input)
        prompt = PromptValue(key, standing, parts.decoder, sees_input)
        tasks.append(DetachedTask(prompt, rows, own))
    return tuple(tasks)
