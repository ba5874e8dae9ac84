"""From sources and settings to all that a run needs, checked from the cheapest to the dearest."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from softprompt.artifacts import Manifest, started_prompt
from softprompt.backbone import Base, freeze, load_base, output_limit
from softprompt.data import CHAT_FIELDS, INPUT, CutSummary, Record, RowTokenizer, TokenRow, Verbalizer
from softprompt.engine import (
    Drawn,
    Engine,
    EngineRow,
    PlainEngine,
    build_engine,
    check_context,
    completed,
    placement_of,
    require_gradient,
    require_isolated,
    score_of,
)
from softprompt.errors import ConfigError, line
from softprompt.prompts import (
    SOURCE_INITS,
    CPTConfig,
    MultitaskPromptTuningConfig,
    Prompt,
    PromptLearningConfig,
    PromptModule,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from softprompt.training.configuration import Origins, labels_text
from softprompt.training.examples import TaskData
from softprompt.training.optimisation import Rates, peak_rates
from softprompt.training.settings import CONTEXT_RECORDS, TuneSettings
from softprompt.training.source_prompts import find_source
from softprompt.training.stage import Goal
from softprompt.training.starts import key_values_start, resolved, with_context, with_demonstrations

logger = logging.getLogger(__name__)

BaseLike: TypeAlias = str | Path | PreTrainedModel | Base

_NO_CONTEXT = [0]
"""``cpt_token_ids`` of a configuration without a context, as in PEFT."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The tokenised records of one task; ``labels`` maps each label to its target ids."""

    data: TaskData
    tokenizer: RowTokenizer
    train: list[TokenRow]
    validation: list[TokenRow]
    labels: dict[str, tuple[int, ...]] | None
    cuts: CutSummary

    def record(self) -> dict[str, Any]:
        """Return what a manifest says of the task's data."""
        cut = {"sources": self.cuts.sources_cut, "targets": self.cuts.targets_cut}
        return self.data.fingerprints | {"cut": cut}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A frozen base, an untrained prompt, and the records to train it on; to a ``goal`` of its own, if any.

    ``hidden`` has the virtual tokens that a record does not see in training: those that it is the start of.
    """

    base: Base
    module: PromptModule
    config: PromptLearningConfig
    engine: Engine
    tasks: list[TaskRows]
    settings: TuneSettings
    rates: Rates
    goal: Goal | None = None
    hidden: Mapping[TokenRow, frozenset[int]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks; empty for a single data set without a name."""
        return tuple(task.data.name for task in self.tasks if task.data.name)

    def manifest(self, metrics: dict[str, Any], history: list[dict[str, Any]]) -> Manifest:
        """Return the manifest of the finished prompt."""
        settings, first = self.settings, self.tasks[0].data
        alone = len(self.tasks) == 1
        kinds = {task.data.kind for task in self.tasks}
        return Manifest(
            template=self.tasks[0].tokenizer.verbalizer.template if alone else settings.verbalizer,
            task="classification" if kinds == {"classification"} else "generation",
            labels=first.labels if alone else None,
            base_model=self.base.name,
            base_fingerprint=self.base.fingerprint_record(),
            max_source_length=settings.max_source_length,
            max_target_length=settings.max_target_length,
            dtype=str(self.base.dtype).removeprefix("torch."),
            seq2seq=self.base.is_encoder_decoder,
            metrics=metrics,
            history=history,
            settings=settings.to_dict(),
            data=self._data(),
            tasks=self.names or None,
            chat=alone and self.tasks[0].tokenizer.chats is not None,
        )

    def _data(self) -> dict[str, Any]:
        if not self.names:
            return self.tasks[0].record()
        return {
            "tasks": {
                task.data.name: {
                    "template": task.tokenizer.verbalizer.template,
                    "chat": task.tokenizer.chats is not None,
                    "task": task.data.kind,
                    "labels": None if task.data.labels is None else list(task.data.labels),
                    **task.record(),
                }
                for task in self.tasks
            }
        }


def prepare(base_model: BaseLike, data: Sequence[TaskData], settings: TuneSettings) -> Prepared:
    """Load the base, tokenise the records, and make an untrained prompt from the seed.

    Raises:
        ContextOverflowError: a row does not fit behind the prompt.
        BackboneError: the base cannot be loaded.
        TrainingError: the base passes no gradient on.
        ConfigError: a setting that this base or this data does not support.
    """
    base = loaded(base_model, settings)
    freeze(base.model)
    _check_gradient(base)
    return _on(base, data, settings)


def varied(prepared: Prepared, settings: TuneSettings) -> Prepared:
    """Return another run on the same base, engine and records, to be trained beside the first one.

    Args:
        prepared: The first run.
        settings: Its settings with another seed, learning rate, method or configuration of the prompt.

    Raises:
        ConfigError: A setting that this base or this data does not support.
    """
    return _on(prepared.base, [task.data for task in prepared.tasks], settings, prepared)


def _on(base: Base, data: Sequence[TaskData], settings: TuneSettings, beside: Prepared | None = None) -> Prepared:
    """Return a run on a base; ``beside`` another one its engine serves, and its rows where they are the same."""
    settings = resolved(settings, base, data)
    config = _configuration(base, data, settings)
    if beside is not None and _reads_alike(config, beside.config):
        tasks = beside.tasks
    else:
        tasks = [_tokenized(task, base, config, settings) for task in data]
    if isinstance(config, CPTConfig) and config.cpt_token_ids == _NO_CONTEXT:
        config = _with_context(config, base, tasks[0], settings)
    chosen = None
    if settings.demonstrations is not None:
        config, chosen = with_demonstrations(config, tasks[0].train, tasks[0].tokenizer, settings)
    rows = [row for task in tasks for row in (*task.train, *task.validation)]
    _check_lengths(base, config, rows, settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        module = started_prompt(config, base.model).to(base.device)
    if not any(each.numel() for each in module.parameters() if each.requires_grad):
        raise ConfigError("num_frozen_tokens leaves no virtual token to train; lower it")
    of_a_text = None
    if config.keys_and_values:
        of_a_text = key_values_start(module, base, tasks[0].train, tasks[0].tokenizer, settings, chosen)
    if beside is not None and dataclasses.replace(settings, seed=beside.settings.seed) == beside.settings:
        rates = beside.rates
    else:
        rates = peak_rates(settings, base, module, of_a_text)
    return Prepared(
        base=base,
        module=module,
        config=config,
        engine=build_engine(base, settings.engine) if beside is None else beside.engine,
        tasks=tasks,
        settings=settings,
        rates=rates,
        hidden={} if chosen is None or not settings.leave_one_out else chosen.hidden,
    )


def _reads_alike(one: PromptLearningConfig, other: PromptLearningConfig) -> bool:
    """Return whether the records are the same rows of tokens with both prompts."""
    return placement_of(one) == placement_of(other) and isinstance(one, CPTConfig) == isinstance(other, CPTConfig)


def _check_gradient(base: Base) -> None:
    """Check that a gradient goes through the base at all, before any pass without gradients.

    Raises:
        TrainingError: It does not.
    """
    drawn = Drawn(base)
    row = EngineRow(drawn.tokens(3), drawn.tokens(2))
    score = score_of(PlainEngine(base, trusted=True), row)
    require_gradient(base, Prompt(drawn.virtual_tokens(2)), score, measure=False)


def teacher_prompt(prepared: Prepared, number: int) -> PromptModule:
    """Return a plain prompt for one task, started as the multitask prompt is; ``number`` varies the seed."""
    config = prepared.config
    shared = {item.name for item in dataclasses.fields(PromptTuningConfig)} - {"peft_type"}
    values = {name: getattr(config, name) for name in shared}
    if values["prompt_tuning_init"] in SOURCE_INITS:
        values["prompt_tuning_init"] = PromptTuningInit.RANDOM_SCALED
    elif values["prompt_tuning_init"] == PromptTuningInit.LABELS:
        values["prompt_tuning_init_text"] = labels_text(prepared.tasks[number].data.labels)
    with torch.random.fork_rng():
        torch.manual_seed(prepared.settings.seed + number)
        base = prepared.base
        return started_prompt(PromptTuningConfig(**values), base.model).to(base.device)


def _configuration(base: Base, data: Sequence[TaskData], settings: TuneSettings) -> PromptLearningConfig:
    """Return the configuration of the run's prompt, its sizes filled in.

    Raises:
        ConfigError: The base, the data or the source prompt does not support it.
    """
    tuning = settings.tuning_config
    source = None
    if tuning.from_source:
        name = tuning.prompt_tuning_init_source_model or ""
        source = find_source(name, settings.source_prompt_base)
    known = {label for task in data for label in task.labels or ()}
    origins = Origins(
        tokenizer=base.name,
        labels=tuple(sorted(known)) or None,
        task_type=TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        source=("", 0)
        if source is None
        else (str(source.weights), source.task_number(tuning.prompt_tuning_init_task)),
    )
    config = settings.configuration(origins)
    if config.task_type not in (None, origins.task_type):
        raise ConfigError(
            f"config has task_type {config.task_type}, {base.facts.architecture} is for "
            f"{origins.task_type}; leave it out"
        )
    config.task_type, config.base_model_name_or_path = origins.task_type, base.name
    if isinstance(config, MultitaskPromptTuningConfig):
        if config.num_tasks not in (1, len(data)):
            raise ConfigError(f"num_tasks is {config.num_tasks}, the data has {len(data)}; leave it out")
        config.num_tasks = len(data)
    config = completed(config, base)
    require_isolated(config, base)
    if source is not None:
        source.check(config, base)
    return config


def _tokenized(task: TaskData, base: Base, config: PromptLearningConfig, settings: TuneSettings) -> TaskRows:
    chats = _train_on(task, base, config, settings)
    tokenizer = RowTokenizer(
        base.tokenizer,
        Verbalizer(task.template if chats else task.plain_template),
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
        seq2seq=base.is_encoder_decoder,
        placement=placement_of(config),
        chats=chats,
    )
    if unused := _columns_left_out(task.train[0], tokenizer):
        logger.info("the template leaves out the columns %s", line(", ".join(unused)))
    of_task = f" of {line(task.name)}" if task.name else ""
    train, cuts = tokenizer.tokenize(task.train)
    if cuts.sources_cut or cuts.targets_cut:
        logger.info("training data%s: %s", of_task, cuts)
    validation: list[TokenRow] = []
    if task.validation:
        validation, validation_cuts = tokenizer.tokenize(task.validation)
        if validation_cuts.sources_cut or validation_cuts.targets_cut:
            logger.info("validation data%s: %s", of_task, validation_cuts)
    labels = None if task.labels is None else tokenizer.labels(task.labels)
    return TaskRows(task, tokenizer, train, validation, labels, cuts)


def _train_on(
    task: TaskData, base: Base, config: PromptLearningConfig, settings: TuneSettings
) -> Literal["last", "all"] | None:
    """Return which answers of a task's chats are trained; None where a plain template renders its records.

    Instructions and prompts get the chat template of a base that has one, because it was trained on that, and a
    server's chat endpoint then answers as trained.
    """
    has_template = bool(base.tokenizer.chat_template) and not base.is_encoder_decoder
    plain = task.plain_template
    if task.chats and (has_template or not plain):
        answers = sum(each.chat.answers for each in task.train if each.chat)
        if settings.train_on == "all" and isinstance(config, CPTConfig):
            raise ConfigError("train_on all would train more than the labels that CPT has; leave it out")
        if has_template:  # otherwise the tokenizer of the rows refuses them
            logger.info("the base's chat template renders the records")
        if settings.train_on is None and answers > len(task.train):
            logger.info("the last answer of each chat is trained; train_on all trains all %s", f"{answers:,}")
        return settings.train_on or "last"
    if settings.train_on is not None:
        raise ConfigError("train_on would be ignored: this base model has no chat template; leave it out")
    if task.chats:
        logger.info("the base has no chat template, so the records get the plain template %r", plain)
    elif has_template:
        logger.info(
            "the base has a chat template, which the plain template %r does not use; records with the columns "
            "prompt and completion, or messages, would get it",
            plain,
        )
    return None


def _columns_left_out(example: Record, tokenizer: RowTokenizer) -> list[str]:
    """Return the columns of a record that its rows do not have."""
    fields = example.fields
    used = {*CHAT_FIELDS} if tokenizer.chats else {*tokenizer.verbalizer.fields}
    # An input column of another name is there under both.
    names = {name for name in fields if fields[name] is fields.get(INPUT)}
    used |= names if used & names else set()
    return [name for name in fields if name not in used]


def loaded(base_model: BaseLike, settings: TuneSettings) -> Base:
    """Load the base; a folder is recorded with its full path, so that the prompt finds it again."""
    source = base_model.model if isinstance(base_model, Base) else base_model
    tokenizer = base_model.tokenizer if isinstance(base_model, Base) else None
    if isinstance(source, str | Path) and Path(source).exists():
        source = Path(source).resolve()
    base = load_base(
        source, tokenizer=tokenizer, torch_dtype=settings.torch_dtype, device=settings.device, shard=settings.shard
    )
    base.model.eval()  # type: ignore[no-untyped-call]
    return Base(base.model, base.tokenizer, base_model.name) if isinstance(base_model, Base) else base


def _check_lengths(
    base: Base, config: PromptLearningConfig, rows: Sequence[TokenRow], settings: TuneSettings
) -> None:
    """Refuse rows that do not fit behind the prompt now, not in the middle of an epoch."""
    seq2seq = base.is_encoder_decoder
    longest = max(len(row.source) + (0 if seq2seq else len(row.target)) for row in rows)
    virtual, types = config.num_virtual_tokens or 0, config.model_types()
    in_decoder = config.keys_and_values and seq2seq
    before = virtual if "ENCODER" in types and not in_decoder else 0
    check_context(longest, before, base.facts.context_length)
    both = max(len(row.source) + len(row.target) for row in rows)
    if settings.max_tokens_per_batch is not None and both > settings.max_tokens_per_batch:
        raise ConfigError(
            f"max_tokens_per_batch {settings.max_tokens_per_batch} is less than the {both} tokens "
            "of the longest row; raise it, or lower max_source_length"
        )
    if seq2seq:
        target = max(len(row.target) for row in rows)
        behind = virtual if "DECODER" in types or in_decoder else 0
        check_context(target, behind, output_limit(base.model), what="decoder")


def _with_context(config: CPTConfig, base: Base, task: TaskRows, settings: TuneSettings) -> CPTConfig:
    """Return the configuration with a context of the first training records."""
    limit = base.facts.context_length
    longest = max(len(row.source) + len(row.target) for row in (*task.train, *task.validation))
    found, count = with_context(
        config,
        task.train,
        task.tokenizer,
        count=settings.context_records or CONTEXT_RECORDS,
        room=None if limit is None or settings.context_records else limit - longest,
    )
    logger.info("the context is the first %d training records, %d tokens", count, found.num_virtual_tokens)
    return found
