"""The enumerations of configurations: task types, methods, and the choices within a method."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, get_args

Measure = Literal["mean", "pairs"]
"""How two prompts are compared: by their mean virtual token, or by all pairs of virtual tokens."""

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
    """The methods of prompt learning that are supported; PEFT's names."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    EXTENDED_PROMPT_TUNING = "EXTENDED_PROMPT_TUNING"
    """Ours: prompt tuning with an option that PEFT does not have (a placement, a decoder prompt, an
    encoder's prompt that does not see the input). PEFT refuses the name, as it must: it would run
    another model."""


KEY_VALUE_METHODS = frozenset({PeftType.PREFIX_TUNING, PeftType.CARTRIDGE})
"""Methods whose prompt is keys and values of every layer, not virtual tokens of the input."""


class Placement(StrEnum):
    """Where a prompt stands among the input's tokens."""

    PREFIX = "prefix"
    """Before the first token, as in PEFT."""
    AFTER_BOS = "after_bos"
    """Behind the token that starts every text (BOS, CLS), where the input begins with one."""
    SUFFIX = "suffix"
    """Behind the last token of the input."""
    CHAT_SYSTEM = "chat_system"
    """Inside the system turn of the tokenizer's chat template."""


class Parameterization(StrEnum):
    """How a prompt's embeddings are parameterised; all are saved baked, as ``[P, H]``."""

    DIRECT = "direct"
    """The embeddings themselves (Lester et al. 2021)."""
    LOW_RANK = "low_rank"
    """A ``[P, r]`` times B ``[r, H]`` (decomposed prompt tuning, Xiao et al. 2023, arXiv:2310.10094)."""
    ULPT = "ulpt"
    """Z ``[P, r]`` times a fixed random ``[r, H]``, then a learned scale and shift (Wu et al. 2025,
    arXiv:2502.04501)."""
    RESIDUAL = "residual"
    """P + MLP(P) (Razdaibiedina et al. 2023, arXiv:2305.03937)."""
    SUPERPOS = "superpos"
    """W ``[P, m]`` times m fixed embeddings of the vocabulary (SuperPos, Sadraei Javaheri et al. 2024,
    arXiv:2406.05279)."""


class PromptTuningInit(StrEnum):
    """Where the first values of a soft prompt come from.

    ``RANDOM``, ``TEXT`` and ``SAMPLE_VOCAB`` mean what they mean in PEFT. ``RANDOM`` is N(0, 1), 50 to 100 times
    outside the embedding scale of a Llama; ``RANDOM_SCALED`` is the same draw times the rms of the base's
    embeddings. ``LABELS`` starts each virtual token at a class label (the mean of its sub-tokens, Lester et al.
    2021), the rest from the vocabulary. ``PROMPT`` starts at another prompt (Vu et al. 2022, SPoT).
    """

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"
    RANDOM_SCALED = "RANDOM_SCALED"
    LABELS = "LABELS"
    PROMPT = "PROMPT"


class MultitaskPromptTuningInit(StrEnum):
    """Where the first values of a multitask prompt come from.

    The last three read a source prompt, ``prompt_tuning_init_state_dict_path``, and take over its shared
    embeddings: the task matrix becomes the mean over the source's tasks (both factors averaged each by itself, as
    in PEFT), that of one task, or starts anew. The others set the shared embeddings as in ``PromptTuningInit``.
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
    """First value of the matrix that a task multiplies the shared embeddings with."""

    ONES = "ones"
    """At exactly 1: every task starts at the shared prompt."""
    NORMAL = "normal"
    """PEFT's: both factors from N(0, 0.02²), so that every prompt starts near zero."""


class PromptEncoderReparameterizationType(StrEnum):
    """The network that P-tuning trains with the embeddings."""

    MLP = "MLP"
    LSTM = "LSTM"
