"""The words configurations are written in: tasks, methods, and choices within a method."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, get_args

Measure = Literal["mean", "pairs"]
"""How two prompts are compared: by their mean rows, or by all pairs of rows."""

MEASURES: tuple[Measure, ...] = get_args(Measure)


class TaskType(StrEnum):
    """What the base model is for; PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The methods of prompt learning this library trains; PEFT's names."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    CPT = "CPT"
    EXTENDED_PROMPT_TUNING = "EXTENDED_PROMPT_TUNING"
    """Ours: prompt tuning with an option that PEFT does not have (a placement, a decoder prompt, an
    encoder's prompt that does not see the input). PEFT refuses the name, as it must: it would run
    another model."""


class Placement(StrEnum):
    """Where a prompt stands among the tokens of its row."""

    PREFIX = "prefix"
    """Before the first token, as in PEFT."""
    AFTER_BOS = "after_bos"
    """Behind the token that starts every text (BOS, CLS), where the row begins with one."""
    SUFFIX = "suffix"
    """Behind the last token of the input."""
    CHAT_SYSTEM = "chat_system"
    """Inside the system turn of the tokenizer's chat template."""


class Parameterization(StrEnum):
    """What is trained in the place of the prompt's rows; all bake down to ``[P, H]`` when saved."""

    DIRECT = "direct"
    """The rows themselves (Lester et al. 2021)."""
    LOW_RANK = "low_rank"
    """A ``[P, r]`` times B ``[r, H]`` (decomposed prompt tuning, Xiao et al. 2023, arXiv:2310.10094)."""
    ULPT = "ulpt"
    """Z ``[P, r]`` times a fixed random ``[r, H]``, then a learned scale and shift (Wu et al. 2025,
    arXiv:2502.04501)."""
    RESIDUAL = "residual"
    """P + MLP(P) (Razdaibiedina et al. 2023, arXiv:2305.03937)."""


class PromptTuningInit(StrEnum):
    """Where the first values of a soft prompt come from.

    ``RANDOM``, ``TEXT`` and ``SAMPLE_VOCAB`` mean what they mean in PEFT. ``RANDOM`` is
    N(0, 1), 50 to 100 times outside the embedding scale of a Llama; ``RANDOM_SCALED`` is
    the same draw times the rms of the base's embeddings. ``LABELS`` starts each row at a
    class label (the mean of its sub-tokens, Lester et al. 2021), the rest from the vocabulary.
    ``PROMPT`` starts at the rows of another prompt (Vu et al. 2022, SPoT).
    """

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"
    RANDOM_SCALED = "RANDOM_SCALED"
    LABELS = "LABELS"
    PROMPT = "PROMPT"


class MultitaskPromptTuningInit(StrEnum):
    """Where the first values of a multitask prompt come from.

    The last three read a source prompt, ``prompt_tuning_init_state_dict_path``, whose shared rows
    they take over: the task matrix becomes the mean over the source's tasks (columns and rows
    averaged each by itself, as in PEFT), that of one task, or starts anew. The others set the
    shared rows as in ``PromptTuningInit``.
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM_SCALED = "RANDOM_SCALED"
    LABELS = "LABELS"


class TaskMatrixInit(StrEnum):
    """How the matrix starts that a task multiplies the shared rows with."""

    ONES = "ones"
    """At exactly 1: every task starts at the shared prompt."""
    NORMAL = "normal"
    """PEFT's: both factors from N(0, 0.02²), so that every prompt starts near zero."""


class PromptEncoderReparameterizationType(StrEnum):
    """What stands behind the rows of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"
