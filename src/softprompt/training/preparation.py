"""From sources and settings to all that a run needs, checked from the cheapest to the dearest."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from softprompt.artifacts.manifest import Manifest
from softprompt.attach.classes import get_peft_model
from softprompt.attach.embedding import PromptEmbedding
from softprompt.attach.model import PeftModel
from softprompt.backbone.facts import Facts, facts_of, output_limit
from softprompt.backbone.fingerprint import Fingerprint
from softprompt.backbone.freeze import freeze
from softprompt.backbone.load import LoadedBase, load_base
from softprompt.data.labels import label_set
from softprompt.data.records import Example, data_fingerprint, read_examples
from softprompt.data.template import Verbalizer
from softprompt.data.tokens import CutSummary, RowTokenizer, TokenRow
from softprompt.engine.choose import build_engine
from softprompt.engine.context import check_context
from softprompt.engine.rows import Engine
from softprompt.errors import ConfigError, DataError, nearest
from softprompt.prompts.configs import PromptTuningConfig, PromptTuningInit, TaskType
from softprompt.training.settings import RATE_PER_RMS, TuneSettings

logger = logging.getLogger(__name__)

Base: TypeAlias = str | Path | PreTrainedModel | LoadedBase
Rows: TypeAlias = str | Path | Iterable[Mapping[str, Any]]

INITS = {
    "RANDOM": PromptTuningInit.RANDOM_SCALED,
    "STANDARD_NORMAL": PromptTuningInit.RANDOM,
    "TEXT": PromptTuningInit.TEXT,
    "SAMPLE_VOCAB": PromptTuningInit.SAMPLE_VOCAB,
    "LABELS": PromptTuningInit.LABELS,
    "PROMPT": PromptTuningInit.PROMPT,
}
"""caikit's names of the initial prompt, and ours."""


@dataclass(frozen=True, slots=True)
class TuningData:
    """The examples of a run, what their targets are, and what identifies the files."""

    train: list[Example]
    validation: list[Example]
    labels: tuple[str, ...] | None
    verbalizer: Verbalizer
    fingerprints: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A base with a fresh prompt attached, and the rows to train it on."""

    base: LoadedBase
    facts: Facts
    fingerprint: Fingerprint
    peft_model: PeftModel
    prompt: Parameter
    engine: Engine
    data: TuningData
    train: list[TokenRow]
    validation: list[TokenRow]
    labels: dict[str, tuple[int, ...]] | None
    cuts: CutSummary
    settings: TuneSettings
    learning_rate: float

    def manifest(self, metrics: dict[str, Any], history: list[dict[str, Any]]) -> Manifest:
        """Return the manifest of the finished prompt."""
        settings = self.settings
        cut = {"sources": self.cuts.sources_cut, "targets": self.cuts.targets_cut}
        return Manifest(
            template=settings.verbalizer,
            task="generation" if self.labels is None else "classification",
            labels=self.data.labels,
            base_model=self.base.name,
            base_fingerprint=self.fingerprint.to_dict(),
            max_source_length=settings.max_source_length,
            max_target_length=settings.max_target_length,
            dtype=str(self.base.model.dtype).removeprefix("torch."),
            seq2seq=self.facts.is_encoder_decoder,
            metrics=metrics,
            history=history,
            settings=settings.to_dict(),
            data=self.data.fingerprints | {"cut": cut},
        )


def read_data(train: Rows, validation: Rows | None, settings: TuneSettings) -> TuningData:
    """Read and check the data against the verbalizer, before any model is loaded.

    Raises:
        DataError: a file or a record cannot be used.
        TemplateError: the verbalizer does not fit the records.
        ConfigError: settings that need validation data, without any.
    """
    verbalizer = Verbalizer(settings.verbalizer)
    if validation is None and settings.early_stopping_patience is not None:
        raise ConfigError(
            "early_stopping_patience needs validation_data: nothing is split off the training data"
        )
    examples = _read(train, verbalizer, settings)
    held_out = [] if validation is None else _read(validation, verbalizer, settings)
    labels = label_set([str(example.target) for example in examples], task=settings.task)
    if labels is not None:
        _check_labels(held_out, labels)
    fingerprints: dict[str, Any] = {"train": data_fingerprint(train)}
    if validation is not None:
        fingerprints["validation"] = data_fingerprint(validation)
    return TuningData(examples, held_out, labels, verbalizer, fingerprints)


def prepare(base_model: Base, data: TuningData, settings: TuneSettings) -> Prepared:
    """Load the base, tokenise the rows, and attach a fresh prompt.

    Raises:
        ContextOverflowError: a row does not fit behind the prompt.
        BackboneError: the base cannot be loaded.
        ConfigError: a setting that this base has no use for.
    """
    base = _loaded(base_model, settings)
    facts = facts_of(base.model)
    settings.tuning_config.check_model_types(facts.is_encoder_decoder)
    freeze(base.model)
    tokenizer = RowTokenizer(
        base.tokenizer,
        data.verbalizer,
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
        seq2seq=facts.is_encoder_decoder,
    )
    train, cuts = tokenizer.tokenize(data.train)
    logger.info("training data: %s", cuts)
    validation: list[TokenRow] = []
    if data.validation:
        validation, validation_cuts = tokenizer.tokenize(data.validation)
        logger.info("validation data: %s", validation_cuts)
    labels = None
    if data.labels is not None:
        labels = tokenizer.labels(data.labels)
    _check_lengths(base, facts, [*train, *validation], settings)
    peft_model = _attached(base, facts, data.labels, settings)
    return Prepared(
        base=base,
        facts=facts,
        fingerprint=Fingerprint.of(base.model),
        peft_model=peft_model,
        prompt=_prompt_of(peft_model),
        engine=build_engine(
            base.model,
            settings.engine,
            prompt_sees_input=settings.tuning_config.prompt_sees_input,
        ),
        data=data,
        train=train,
        validation=validation,
        labels=labels,
        cuts=cuts,
        settings=settings,
        learning_rate=_learning_rate(settings, facts),
    )


def _read(source: Rows, verbalizer: Verbalizer, settings: TuneSettings) -> list[Example]:
    examples = read_examples(
        source, input_field=settings.input_field, output_field=settings.output_field
    )
    verbalizer.check(examples, settings.output_field)
    return examples


def _check_labels(examples: Sequence[Example], labels: tuple[str, ...]) -> None:
    for number, example in enumerate(examples, start=1):
        if example.target not in labels:
            target = str(example.target)
            raise DataError(
                f"validation row {number}: {target!r} is not among the {len(labels)} labels of the "
                f"training data{nearest(target, labels)}; correct it, or set task to 'generation'"
            )


def _loaded(base_model: Base, settings: TuneSettings) -> LoadedBase:
    """Load the base; a folder is recorded with its full path, so that the prompt finds it again."""
    source = base_model.model if isinstance(base_model, LoadedBase) else base_model
    tokenizer = base_model.tokenizer if isinstance(base_model, LoadedBase) else None
    if isinstance(source, str | Path) and Path(source).is_dir():
        source = Path(source).resolve()
    loaded = load_base(
        source, tokenizer=tokenizer, torch_dtype=settings.torch_dtype, device=settings.device
    )
    loaded.model.eval()  # type: ignore[no-untyped-call]
    return loaded


def _attached(
    base: LoadedBase, facts: Facts, labels: tuple[str, ...] | None, settings: TuneSettings
) -> PeftModel:
    """Attach a prompt that starts from the seed alone, leaving global randomness untouched."""
    tuning = settings.tuning_config
    init = INITS[tuning.prompt_tuning_init_method]
    text = tuning.prompt_tuning_init_text
    if init is PromptTuningInit.LABELS:
        if labels is None:
            raise ConfigError(
                "prompt_tuning_init_method LABELS needs a classification task, and the targets "
                "look like free text; set task to 'classification', or use RANDOM"
            )
        text = "\n".join(labels)
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if facts.is_encoder_decoder else TaskType.CAUSAL_LM,
        num_virtual_tokens=tuning.num_virtual_tokens,
        num_transformer_submodules=1,
        prompt_sees_input=tuning.prompt_sees_input,
        prompt_tuning_init=init,
        prompt_tuning_init_text=text,
        prompt_tuning_init_prompt=tuning.prompt_tuning_init_prompt,
        tokenizer_name_or_path=base.name if text or tuning.prompt_tuning_init_prompt else None,
        base_model_name_or_path=base.name,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(base.model, config)


def _prompt_of(peft_model: PeftModel) -> Parameter:
    encoder = cast(PromptEmbedding, peft_model.prompt_encoder["default"])
    return cast(Parameter, encoder.embedding.weight)


def _check_lengths(
    base: LoadedBase, facts: Facts, rows: Sequence[TokenRow], settings: TuneSettings
) -> None:
    """Refuse rows that do not fit behind the prompt now, not in the middle of an epoch."""
    seq2seq = facts.is_encoder_decoder
    longest = max(len(row.source) + (0 if seq2seq else len(row.target)) for row in rows)
    check_context(longest, settings.tuning_config.num_virtual_tokens, facts.context_length)
    both = max(len(row.source) + len(row.target) for row in rows)
    if settings.max_tokens_per_batch is not None and both > settings.max_tokens_per_batch:
        raise ConfigError(
            f"max_tokens_per_batch {settings.max_tokens_per_batch} is less than the {both} tokens "
            "of the longest row; raise it, or lower max_source_length"
        )
    if seq2seq:
        target = max(len(row.target) for row in rows)
        check_context(target, 0, output_limit(base.model), what="decoder")


def _learning_rate(settings: TuneSettings, facts: Facts) -> float:
    """Return the learning rate, and say how it stands to the scale of the embeddings."""
    rms = facts.embedding_rms
    if settings.learning_rate is None:
        rate = RATE_PER_RMS * rms
        logger.info("learning rate %.4g (%g x the embedding rms %.4g)", rate, RATE_PER_RMS, rms)
        return rate
    rate = settings.learning_rate
    logger.info(
        "learning rate %.4g as given (%.3g x the embedding rms %.4g)", rate, rate / rms, rms
    )
    return rate
