"""From sources and settings to all that a run needs, checked from the cheapest to the dearest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from softprompt.artifacts import Manifest
from softprompt.backbone import (
    Base,
    Facts,
    Fingerprint,
    facts_of,
    freeze,
    load_base,
    output_limit,
)
from softprompt.data import CutSummary, RowTokenizer, TokenRow, Verbalizer
from softprompt.engine import Engine, build_engine, check_context
from softprompt.errors import ConfigError
from softprompt.peft import PeftModel
from softprompt.prompts import Placement, PromptModule
from softprompt.training.attachment import attach
from softprompt.training.examples import TaskData
from softprompt.training.optimisation import Rates
from softprompt.training.settings import RATE_PER_RMS, TASK_RATE, TuneSettings

logger = logging.getLogger(__name__)

BaseLike: TypeAlias = str | Path | PreTrainedModel | Base


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The tokenised rows of one task; ``labels`` maps each label to its target ids."""

    data: TaskData
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
    """A base with a fresh prompt attached, and the rows to train it on."""

    base: Base
    facts: Facts
    fingerprint: Fingerprint
    peft_model: PeftModel
    engine: Engine
    tasks: list[TaskRows]
    settings: TuneSettings
    rates: Rates

    @property
    def prompt(self) -> PromptModule:
        """The module that is trained."""
        return self.peft_model.encoder_of("default")

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
            template=first.template if alone else settings.verbalizer,
            task="classification" if kinds == {"classification"} else "generation",
            labels=first.labels if alone else None,
            base_model=self.base.name,
            base_fingerprint=self.fingerprint.to_dict(),
            max_source_length=settings.max_source_length,
            max_target_length=settings.max_target_length,
            dtype=str(self.base.model.dtype).removeprefix("torch."),
            seq2seq=self.facts.is_encoder_decoder,
            metrics=metrics,
            history=history,
            settings=settings.to_dict(),
            data=self._data(),
            tasks=self.names or None,
        )

    def _data(self) -> dict[str, Any]:
        if not self.names:
            return self.tasks[0].record()
        return {
            "tasks": {
                task.data.name: {
                    "template": task.data.template,
                    "task": task.data.kind,
                    "labels": None if task.data.labels is None else list(task.data.labels),
                    **task.record(),
                }
                for task in self.tasks
            }
        }


def prepare(base_model: BaseLike, data: Sequence[TaskData], settings: TuneSettings) -> Prepared:
    """Load the base, tokenise the rows, and attach a fresh prompt.

    Raises:
        ContextOverflowError: a row does not fit behind the prompt.
        BackboneError: the base cannot be loaded.
        ConfigError: a setting that this base has no use for.
    """
    base = _loaded(base_model, settings)
    facts = facts_of(base.model)
    settings.check_model_types(facts.is_encoder_decoder)
    freeze(base.model)
    tasks = [_tokenized(task, base, facts, settings) for task in data]
    rows = [row for task in tasks for row in (*task.train, *task.validation)]
    _check_lengths(base, facts, rows, settings)
    return Prepared(
        base=base,
        facts=facts,
        fingerprint=Fingerprint.of(base.model),
        peft_model=attach(base, facts, data, settings),
        engine=build_engine(base, settings.engine),
        tasks=tasks,
        settings=settings,
        rates=_rates(settings, facts),
    )


def _tokenized(task: TaskData, base: Base, facts: Facts, settings: TuneSettings) -> TaskRows:
    tokenizer = RowTokenizer(
        base.tokenizer,
        Verbalizer(task.template),
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
        seq2seq=facts.is_encoder_decoder,
        placement=Placement(settings.tuning_config.placement),
    )
    of_task = f" of {task.name}" if task.name else ""
    train, cuts = tokenizer.tokenize(task.train)
    logger.info("training data%s: %s", of_task, cuts)
    validation: list[TokenRow] = []
    if task.validation:
        validation, validation_cuts = tokenizer.tokenize(task.validation)
        logger.info("validation data%s: %s", of_task, validation_cuts)
    labels = None if task.labels is None else tokenizer.labels(task.labels)
    return TaskRows(task, train, validation, labels, cuts)


def _loaded(base_model: BaseLike, settings: TuneSettings) -> Base:
    """Load the base; a folder is recorded with its full path, so that the prompt finds it again."""
    source = base_model.model if isinstance(base_model, Base) else base_model
    tokenizer = base_model.tokenizer if isinstance(base_model, Base) else None
    if isinstance(source, str | Path) and Path(source).is_dir():
        source = Path(source).resolve()
    loaded = load_base(
        source, tokenizer=tokenizer, torch_dtype=settings.torch_dtype, device=settings.device
    )
    loaded.model.eval()  # type: ignore[no-untyped-call]
    return loaded


def _check_lengths(
    base: Base, facts: Facts, rows: Sequence[TokenRow], settings: TuneSettings
) -> None:
    """Refuse rows that do not fit behind the prompt now, not in the middle of an epoch."""
    seq2seq = facts.is_encoder_decoder
    longest = max(len(row.source) + (0 if seq2seq else len(row.target)) for row in rows)
    tuning = settings.tuning_config
    types = tuning.model_types(seq2seq)
    before = tuning.num_virtual_tokens if "ENCODER" in types else 0
    check_context(longest, before, facts.context_length)
    both = max(len(row.source) + len(row.target) for row in rows)
    if settings.max_tokens_per_batch is not None and both > settings.max_tokens_per_batch:
        raise ConfigError(
            f"max_tokens_per_batch {settings.max_tokens_per_batch} is less than the {both} tokens "
            "of the longest row; raise it, or lower max_source_length"
        )
    if seq2seq:
        target = max(len(row.target) for row in rows)
        behind = tuning.num_virtual_tokens if "DECODER" in types else 0
        check_context(target, behind, output_limit(base.model), what="decoder")


def _rates(settings: TuneSettings, facts: Facts) -> Rates:
    """Return the learning rates, and say how they stand to the scale of the embeddings."""
    rms = facts.embedding_rms
    if settings.learning_rate is None:
        rate = RATE_PER_RMS * rms
        logger.info("learning rate %.4g (%g x the embedding rms %.4g)", rate, RATE_PER_RMS, rms)
    else:
        rate = settings.learning_rate
        logger.info(
            "learning rate %.4g as given (%.3g x the embedding rms %.4g)", rate, rate / rms, rms
        )
    if not settings.multitask:
        return Rates(rate)
    task_rate = settings.task_learning_rate or TASK_RATE
    logger.info("learning rate of the task matrices %.4g", task_rate)
    return Rates(rate, task_rate)
