"""Prompt tuning: P virtual tokens in front of the input are trained, nothing else.

The input of a frozen model becomes ``[E; X]``, with E ``[P, H]`` trained and X ``[T, H]`` the text's
embeddings (Lester et al. 2021, arXiv:2104.08691). ``parameterisations`` has what E may be a function of.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.fields import check_number, member, setting
from softprompt.prompts import (
    PROMPT_KEY,
    Parameterization,
    PeftType,
    Placement,
    PromptLearningConfig,
    PromptModule,
    PromptTuningInit,
    Start,
    TaskType,
    check_task,
    initialisers,
    take_over,
)
from softprompt.prompts.methods.parameterisations import Parameterised, parameterised

logger = logging.getLogger(__name__)


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: P virtual tokens in front of the input, embeddings ``[P, H]``.

    ``tokenizer_kwargs`` go to ``AutoTokenizer.from_pretrained``; ``add_special_tokens=False``
    among them leaves the tokenizer's special tokens out of the text (PEFT keeps them).
    """

    method: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    """The method's name in PEFT, as long as no option is set that PEFT lacks."""
    inits: ClassVar[type[StrEnum]] = PromptTuningInit
    """What ``prompt_tuning_init`` may be."""
    source_inits: ClassVar[tuple[StrEnum, ...]] = ()
    """Those of them that read a source prompt."""
    native_model_types: ClassVar[tuple[list[str] | None, ...]] = (None, ["ENCODER"])
    """Values of ``output_model_types`` that mean the same in PEFT."""

    prompt_tuning_init: PromptTuningInit | str = setting(PromptTuningInit.RANDOM, "How the prompt starts.")
    prompt_tuning_init_text: str | None = setting(None, "Text for TEXT; one label a line for LABELS.")
    tokenizer_name_or_path: str | None = setting(None, "Tokenizer for TEXT and LABELS.")
    tokenizer_kwargs: dict[str, Any] | None = setting(None, "Keyword arguments of the tokenizer, with TEXT only.")
    prompt_sees_input: bool = setting(
        True, "Whether an encoder's prompt attends to the input, as in PEFT.", ours=True
    )
    output_model_types: list[str] | None = setting(
        None, "Parts of a seq2seq model that get a prompt: ENCODER, DECODER.", ours=True
    )
    placement: Placement | str = setting(Placement.PREFIX, "Where the prompt stands in the input.", ours=True)
    parameterization: Parameterization | str = setting(
        Parameterization.DIRECT, "Parameterisation of the embeddings.", ours=True
    )
    parameterization_rank: int | None = setting(
        None, "Rank r of low_rank and ulpt; embeddings m that superpos mixes.", ours=True
    )
    prompt_tuning_init_prompt: str | None = setting(None, "Saved prompt to start from, for PROMPT.", ours=True)

    def __post_init__(self) -> None:
        """Validate the initialisation.

        Raises:
            ConfigError: For an unknown initialisation, or settings it lacks or would ignore.
        """
        super().__post_init__()
        self.placement = member(Placement, "placement", self.placement)
        self.parameterization = member(Parameterization, "parameterization", self.parameterization)
        self._check_parameterization()
        self._check_model_types()
        extended = self.peft_options() != {}
        self.peft_type = PeftType.EXTENDED_PROMPT_TUNING if extended else self.method
        self.prompt_tuning_init = member(self.inits, "prompt_tuning_init", self.prompt_tuning_init)
        self._check_text()
        self._check_prompt()

    def _check_prompt(self) -> None:
        init = self.prompt_tuning_init
        if init != PromptTuningInit.PROMPT:
            if self.prompt_tuning_init_prompt is not None:
                raise ConfigError(
                    f"prompt_tuning_init_prompt would be ignored with prompt_tuning_init='{init}'; "
                    "use PROMPT, or leave it out"
                )
            return
        # A saved prompt does not carry where it started from.
        if not self.prompt_tuning_init_prompt and not self.inference_mode:
            raise ConfigError(
                "When prompt_tuning_init='PROMPT', prompt_tuning_init_prompt can't be "
                f"{self.prompt_tuning_init_prompt}."
            )
        if self.parameterization is not Parameterization.DIRECT:
            raise ConfigError(
                f"prompt_tuning_init='PROMPT' starts at embeddings, which parameterization "
                f"{self.parameterization} cannot be given; use direct, or another initialisation"
            )

    def peft_options(self) -> dict[str, Any]:
        """Return the options set here that PEFT does not have; where there is one, it cannot load the prompt."""
        options: dict[str, Any] = {}
        if not self.prompt_sees_input:
            options["prompt_sees_input"] = False
        if self.output_model_types not in self.native_model_types and not self._has_one_input():
            options["output_model_types"] = list(self.output_model_types or ())
        if self.placement is not Placement.PREFIX:
            options["placement"] = str(self.placement)
        return options

    def build(self, word_embeddings: nn.Embedding, start: Start) -> PromptModule:
        """Return the untrained module; see ``PromptLearningConfig``."""
        return PromptEmbedding(self, word_embeddings, generator=start.generator)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under PEFT's keys; ours are among them only where they are set.

        The parameterisation is no part of the artifact: the embeddings are saved baked.
        """
        return super().to_dict() | self.peft_options()

    def _has_one_input(self) -> bool:
        """Return whether the base has one input, as every base but a seq2seq model has."""
        return self.task_type not in (None, TaskType.SEQ_2_SEQ_LM)

    def _check_text(self) -> None:
        init = self.prompt_tuning_init
        if init in (PromptTuningInit.TEXT, PromptTuningInit.LABELS):
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                value = getattr(self, name)
                if value is None or not value.strip():
                    raise ConfigError(f"When prompt_tuning_init='{init}', {name} can't be {value}.")
        if self.tokenizer_kwargs and init != PromptTuningInit.TEXT:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")

    def _check_parameterization(self) -> None:
        ranked = self.parameterization in (Parameterization.LOW_RANK, Parameterization.ULPT)
        rank = self.parameterization_rank
        if ranked:
            check_number(f"parameterization_rank of {self.parameterization}", int, rank, least=1)
        elif rank is not None and self.parameterization is not Parameterization.SUPERPOS:
            raise ConfigError(
                f"parameterization_rank would be ignored with parameterization {self.parameterization}; "
                "leave it out, or use low_rank, ulpt or superpos"
            )
        elif rank is not None:
            check_number("parameterization_rank", int, rank, least=1)

    def _check_model_types(self) -> None:
        if self.output_model_types is None:
            return
        if isinstance(self.output_model_types, str):
            raise ConfigError(
                f"output_model_types must be a list, such as ['{self.output_model_types}'], got "
                f"{self.output_model_types!r}"
            )
        given = [str(each) for each in self.output_model_types]
        allowed = [["ENCODER"], ["DECODER"], ["ENCODER", "DECODER"]]
        if sorted(given, reverse=True) not in allowed:
            raise ConfigError(f"output_model_types must be one of {', '.join(map(str, allowed))}, got {given}")
        self.output_model_types = sorted(given, reverse=True)
        if given == ["DECODER"] and not self._has_one_input() and not self.prompt_sees_input:
            raise ConfigError(
                "prompt_sees_input would be ignored with output_model_types ['DECODER']: it is about the "
                "encoder's prompt; leave one of them out"
            )


@final
class PromptEmbedding(PromptModule):
    """P trainable embeddings in front of a frozen model's input (Lester et al. 2021).

    They are ``embedding.weight``, float32 ``[S·P, H]`` whatever the base's dtype: a bfloat16 prompt
    cannot take small steps. With a ``parameterization`` there is ``parameterisation`` in its place; the
    embeddings it makes are what is saved, and embeddings that are loaded are trained directly.
    """

    embedding: nn.Embedding
    parameterisation: Parameterised | None

    def __init__(
        self, config: PromptTuningConfig, word_embeddings: nn.Embedding, *, generator: torch.Generator | None = None
    ) -> None:
        """Create and initialise the embeddings."""
        super().__init__(config)
        table = initial_table(config, word_embeddings, generator)
        self.parameterisation = (
            None
            if config.inference_mode
            else parameterised(
                Parameterization(config.parameterization),
                table.weight.detach(),
                config.parameterization_rank or 0,
                generator,
                partial(_sampled, word_embeddings, generator),
            )
        )
        if self.parameterisation is None:
            self.embedding = table

    def materialize(self, task: int = 0) -> Tensor:
        """Return the embeddings ``[S·P, H]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        behind = self.parameterisation
        return self.embedding.weight if behind is None else behind.embeddings()

    def stored(self) -> dict[str, Tensor]:
        """Return what a file holds; see ``PromptModule``."""
        return {PROMPT_KEY: self.materialize().detach().cpu().clone()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Load stored embeddings, which are trained directly from then on; see ``PromptModule``."""
        behind = self.parameterisation
        if behind is None:
            take_over({PROMPT_KEY: self.embedding.weight}, tensors)
            return
        value = behind.embeddings().detach().clone()
        take_over({PROMPT_KEY: value}, tensors)
        trains = any(parameter.requires_grad for parameter in behind.parameters())
        length, width = value.shape
        self.embedding = nn.Embedding(length, width, _weight=value, _freeze=not trains)
        self.parameterisation = None
        logger.info(
            "the loaded embeddings are baked: training goes on with the embeddings themselves, not %s",
            type(behind).__name__,
        )

    def forward(self, indices: Tensor) -> Tensor:
        """Return embeddings ``[..., H]`` for indices, as PEFT's module does."""
        return self.materialize()[indices]


def _sampled(table: nn.Embedding, generator: torch.Generator | None, length: int) -> Tensor:
    """Return the embeddings ``[N, H]`` of tokens drawn from the vocabulary."""
    return initialisers.sampled(length, table.weight.shape[0], initialisers.lookup(table), generator=generator)


def initial_table(
    config: PromptTuningConfig, word_embeddings: nn.Embedding, generator: torch.Generator | None
) -> nn.Embedding:
    """Return an initialised table ``[S·P, H]`` in float32.

    Under ``inference_mode``, and where a source prompt is about to be copied in, nothing is read and
    the values are those of RANDOM.

    Raises:
        ConfigError: If the config does not fit the base, or its text cannot be used.
    """
    count, width = config.table_size(word_embeddings.weight.shape[1])
    table = nn.Embedding(count, width, dtype=torch.float32)
    init = config.prompt_tuning_init
    if config.inference_mode or init == PromptTuningInit.RANDOM or init in config.source_inits:
        if generator is not None:
            drawn = initialisers.normal(count, width, std=1.0, generator=generator)
            table.weight.data.copy_(drawn)
        return table
    submodules = config.num_transformer_submodules or 1
    length = count // submodules
    # Each part of the model starts at the whole text, not the decoder where the encoder's tokens end.
    parts = [_initial_part(config, word_embeddings, length, generator) for _ in range(submodules)]
    table.weight.data.copy_(torch.cat(parts))
    return table


def _initial_part(
    config: PromptTuningConfig, table: nn.Embedding, length: int, generator: torch.Generator | None
) -> Tensor:
    """Return the first values ``[P, H]`` of the prompt of one part of the model."""
    vocabulary, width = table.weight.shape
    embed = initialisers.lookup(table)
    text, tokenizer = config.prompt_tuning_init_text or "", str(config.tokenizer_name_or_path)
    match config.prompt_tuning_init:
        case PromptTuningInit.TEXT:
            ids = initialisers.text_token_ids(text, tokenizer, config.tokenizer_kwargs)
            return initialisers.from_tokens(length, ids, embed)
        case PromptTuningInit.LABELS:
            labels = initialisers.label_token_ids(text, tokenizer)
            return initialisers.from_labels(length, labels, vocabulary, embed, generator=generator)
        case PromptTuningInit.SAMPLE_VOCAB:
            return initialisers.sampled(length, vocabulary, embed, generator=generator)
        case PromptTuningInit.PROMPT:
            raise ConfigError(
                "prompt_tuning_init='PROMPT' needs the base model, to check that the prompt is its own; "
                "use get_peft_model, or add_adapter"
            )
    rms = initialisers.rms(embed, vocabulary)
    return initialisers.normal(length, width, std=rms, generator=generator)
