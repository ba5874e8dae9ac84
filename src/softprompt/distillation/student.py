"""The student: the base with a prompt and without the text, its first values, and what it is trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from softprompt.artifacts import check_base, load_adapter
from softprompt.backbone import Base, key_values
from softprompt.data import INPUT, check_label
from softprompt.distillation import TEXT_RATE_PER_RMS, HeldOut, HeldOutMeasure, start_ids
from softprompt.errors import ConfigError, ContextOverflowError, DataError, TrainingError
from softprompt.prompts import PROMPT_KEY, FlatOrder, PromptLearningConfig, from_tokens, lookup
from softprompt.training import Goal, LabelChoice, Prepared, TaskData, TopDivergence, TopTargets, prepare

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.data import TokenRow
    from softprompt.distillation import DistillSettings, Question, Teacher

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class Student:
    """A prompt that was not trained yet, and the questions it is trained and validated on.

    Attributes:
        prepared: The prompt, its base and its rows, as a run of ``tune`` has them.
        questions: The questions, those to train on before those that are kept apart.
        asked: Their rows as the teacher reads them.
        rows: Their rows as the student reads them.
        distractors: Keys and values of other prompts to train beside, ``[L, 2, A_kv, P, D]`` each.
    """

    prepared: Prepared
    questions: tuple[Question, ...]
    asked: tuple[TokenRow, ...]
    rows: tuple[TokenRow, ...]
    distractors: tuple[Tensor, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Target tokens of each row."""
        return [len(row.target) for row in self.rows]

    @classmethod
    def of(
        cls, teacher: Teacher, questions: Sequence[Question], settings: DistillSettings, data: Mapping[str, Any]
    ) -> Student:
        """Prepare a student for answered questions.

        Args:
            teacher: The teacher.
            questions: The questions.
            settings: The settings.
            data: What identifies the data, for the manifest and for resuming.

        Raises:
            ConfigError: The prompt would be longer than the text, or stand where the base has no place for it.
            DataError: An answer has other tokens behind the text than without it.
        """
        chat = teacher.manifest.chat
        ordered = sorted(questions, key=lambda each: each.held_out)
        records = [each.record(chat=chat) for each in ordered]
        count = sum(not each.held_out for each in ordered)
        config, ids = configuration_of(teacher, settings), _start_ids(teacher, settings)
        task = TaskData(
            name="",
            train=records[:count],
            validation=records[count:],
            labels=teacher.manifest.labels,
            template=settings.verbalizer,
            fingerprints=dict(data),
        )
        prepared = prepare(teacher.base, [task], settings.tuning(config))
        starts_at_text = settings.kind == "kv" and settings.start != "vocabulary"
        if starts_at_text and settings.learning_rate is None:
            rate = TEXT_RATE_PER_RMS * prepared.rates.rms
            rates = replace(prepared.rates, prompt=rate, usual=rate)
            prepared = replace(prepared, rates=rates)
            logger.info(
                "learning rate %.4g instead, as they start at a text (%g x)", rates.prompt, TEXT_RATE_PER_RMS
            )
        asked, _ = teacher.rows.tokenize(records)
        rows = (*prepared.tasks[0].train, *prepared.tasks[0].validation)
        for question, one, other in zip(ordered, asked, rows, strict=True):
            if one.target != other.target:
                asked_for = question.text[:40]
                raise DataError(f"the answer to {asked_for!r} is other tokens behind the text; leave it out")
        _start(prepared, asked[0], ids)
        others = tuple(_distractor(each, teacher.base) for each in settings.distractors)
        return cls(prepared, tuple(ordered), tuple(asked), rows, others)

    def taught(
        self, targets: Sequence[TopTargets], label_weight: float, check_stop: Callable[[], None]
    ) -> tuple[Prepared, HeldOut]:
        """Return what to train, given what the teacher predicts for each row, and what was kept apart."""
        count = len(self.prepared.tasks[0].train)
        apart = slice(count, None)
        held_out = HeldOut(self.questions[apart], self.asked[apart], self.rows[apart], targets[apart])
        keys = [(row.source, row.target) for row in self.rows[:count]]
        labelled = [key for key, each in zip(keys, self.questions[:count], strict=True) if each.labelled]
        engine, size = self.prepared.engine, self.prepared.settings.batch_size
        labels = self.prepared.tasks[0].labels or {}
        choice = LabelChoice.of(engine, tuple(labels.values()), self.prepared.settings.choice_weight)
        if choice and any(each.scores is None for each in self.questions[:count]):
            raise TrainingError(
                "cannot resume: the questions were answered by an earlier version, without scores of the labels; "
                "start again with overwrite=True"
            )
        scores = [[(each.scores or {}).get(name, 0.0) for name in labels] for each in self.questions[:count]]
        objective = TopDivergence(
            engine,
            dict(zip(keys, targets[:count], strict=True)),
            dict.fromkeys(labelled, label_weight),
            self.distractors,
            choice,
            dict(zip(keys, scores, strict=True)),
        )
        measure = HeldOutMeasure(engine, held_out, 2 * size, check_stop) if held_out.questions else None
        return replace(self.prepared, goal=Goal(objective, measure)), held_out


def check_student(teacher: Teacher, settings: DistillSettings, given: Sequence[Question] = ()) -> None:
    """Refuse what would fail once the questions are answered, before that work is begun.

    Raises:
        SoftPromptError: As for ``Student.of``, the context has no room for prompt, question and answer, the
            template has other fields than self-study can fill, or an answer is none of the examples' labels.
    """
    configuration_of(teacher, settings)
    _start_ids(teacher, settings)
    limit, tokens = teacher.base.facts.context_length, settings.num_virtual_tokens
    asked, answered = settings.max_source_length, settings.max_target_length
    if limit is not None and tokens + asked + answered > limit:
        raise ContextOverflowError(
            f"num_virtual_tokens {tokens}, max_source_length {asked} and max_target_length {answered} exceed the "
            f"model's context of {limit} tokens together; lower one of them"
        )
    if settings.choice_weight and len(teacher.manifest.labels or ()) < 2:
        raise ConfigError(
            "choice_weight would be ignored: it needs examples with labels, two or more; leave it out"
        )
    labels = teacher.manifest.labels
    for number, each in enumerate(given, start=1):
        if labels is not None and each.answer is not None:
            check_label(each.answer, labels, f"the answer to question {number}", "the examples")
    for path in settings.distractors:
        _distractor(path, teacher.base)
    if settings.self_study and not teacher.manifest.chat and teacher.manifest.fields != (INPUT,):
        raise ConfigError("self_study needs a verbalizer whose one field is input; change it, or give questions")


def _start_ids(teacher: Teacher, settings: DistillSettings) -> list[int]:
    count, vocabulary = settings.num_virtual_tokens, teacher.base.facts.vocabulary
    return start_ids(settings.start, teacher.passages, count, vocabulary, settings.seed)


def configuration_of(teacher: Teacher, settings: DistillSettings) -> PromptLearningConfig:
    """Return the configuration of the student's prompt.

    Raises:
        ConfigError: It would stand in front of a chat that no chat template renders.
    """
    in_front = settings.kind == "kv" or settings.placement == "prefix"
    if teacher.chat and not teacher.manifest.chat and in_front:
        raise ConfigError(
            "a chat with a template of one's own needs the prompt in its system turn: kind virtual-tokens and "
            "placement auto; or leave chat out"
        )
    return settings.configuration(chat=teacher.chat)


def _start(prepared: Prepared, asked: TokenRow, ids: Sequence[int]) -> None:
    """Start the prompt at tokens; keys and values at theirs behind what stands before the teacher's text."""
    base, config = prepared.base, prepared.config
    if config.keys_and_values:
        whole = [*asked.source[: asked.at], *ids][: len(ids)]
        values = FlatOrder.of(config).flattened(key_values(base.model, whole))
    else:
        values = from_tokens(len(ids), ids, lookup(base.embedding))
    prepared.module.load_stored({PROMPT_KEY: values})


def _distractor(path: str, base: Base) -> Tensor:
    """Return the keys and values of a stored prompt.

    Raises:
        ConfigError: It holds none, or its layers have other sizes.
        FingerprintError: It is of another base.
        ArtifactError: It cannot be read.
    """
    stored = load_adapter(path)
    check_base(stored, base.model)
    other, need = stored.configuration(), base.key_value_shape
    order = FlatOrder.of(other) if other.keys_and_values else None
    if order is None or (order.layers, order.heads, order.width) != (need.layers, need.heads, need.width):
        sizes = f" {list(order.shape)}" if order else ""
        raise ConfigError(
            f"expected distractors of keys and values [{need.layers}, 2, {need.heads}, P, {need.width}], {path} is "
            f"{stored.config['peft_type']}{sizes}; give prompts that distill made with kind kv"
        )
    return order.unflattened(order.read(stored.tensors)[PROMPT_KEY])
