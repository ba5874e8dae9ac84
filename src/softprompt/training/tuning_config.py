"""caikit's ``tuning_config``: what a prompt is and what it starts from, for every method.

caikit-nlp's names, and for the options that it does not have those of the methods' configurations, whose
defaults hold where a field is None. What a value may be is checked by the configuration; here is only what
caikit's names of initialisations need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Literal

from softprompt.errors import ConfigError
from softprompt.fields import check, default_of, setting
from softprompt.prompts import MultitaskPromptTuningInit

SOURCE_METHODS: Mapping[str, MultitaskPromptTuningInit] = {
    "AVERAGE_SOURCE": MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    "AVERAGE_SOURCE_TASKS": MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    "EXACT_SOURCE_TASK": MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    "ONLY_SOURCE_SHARED": MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
}
"""Methods that start from a source prompt, and what PEFT calls each."""

AUTO = "AUTO"
"""The initialisation that is chosen by what is known of the task; see ``starts``."""

_NEEDS: Mapping[str, tuple[str, ...]] = {
    "prompt_tuning_init_text": ("TEXT", AUTO),
    "prompt_tuning_init_special_tokens": ("TEXT", AUTO),
    "prompt_tuning_init_source_model": tuple(SOURCE_METHODS),
    "prompt_tuning_init_task": ("EXACT_SOURCE_TASK",),
}
"""Settings that mean something with some initialisations only, where the configuration does not know them."""

_OF_A_SOURCE = ("prompt_tuning_init_source_model", "prompt_tuning_init_task")

_PEFT_NAMES: Mapping[str, str] = {"RANDOM": "STANDARD_NORMAL", "RANDOM_SCALED": "RANDOM"}
"""PEFT's enumeration keeps PEFT's meaning, in which RANDOM is N(0, 1)."""

InitMethod = Literal[
    "RANDOM",
    "AUTO",
    "TEXT",
    "SAMPLE_VOCAB",
    "LABELS",
    "PROMPT",
    "STANDARD_NORMAL",
    "ONLY_SOURCE_SHARED",
    "AVERAGE_SOURCE",
    "AVERAGE_SOURCE_TASKS",
    "EXACT_SOURCE_TASK",
]

_PROMPT, _TASKS = "Prompt", "Several tasks"
_P_TUNING, _PREFIX, _CARTRIDGE = "P-tuning", "Prefix tuning", "Cartridge"
_CPT = "Context-aware prompt tuning"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """The prompt itself: how long it is, where it stands, and what it starts from."""

    num_virtual_tokens: int = setting(20, "Number of virtual tokens.", least=1, group=_PROMPT)
    prompt_tuning_init_method: InitMethod | None = setting(
        None,
        "Initialisation: RANDOM (normal, at the scale of the base model's embeddings; the default for class "
        "labels), SAMPLE_VOCAB (random tokens; the default for other targets), AUTO (the class labels "
        "if there are any, else the initial text, else the template's words), TEXT "
        "(embeddings of prompt_tuning_init_text), LABELS (class "
        "labels), PROMPT (a saved prompt), STANDARD_NORMAL (N(0, 1), PEFT's RANDOM); from a "
        "source prompt AVERAGE_SOURCE (shared prompt and mean of its tasks), "
        "EXACT_SOURCE_TASK (one of its tasks) or ONLY_SOURCE_SHARED.",
        group=_PROMPT,
    )
    prompt_tuning_init_text: str | None = setting(
        None, "Initial text, with prompt_tuning_init_method TEXT or AUTO.", group=_PROMPT
    )
    prompt_tuning_init_special_tokens: bool = setting(
        True, "Keep the tokenizer's special tokens around the initial text, as PEFT does.", group=_PROMPT
    )
    prompt_tuning_init_prompt: str | None = setting(
        None,
        "Initial prompt, of any length and of this base model or another, with prompt_tuning_init_method PROMPT.",
        group=_PROMPT,
    )
    prompt_tuning_init_source_model: str | None = setting(
        None, "Source prompt, relative to source_prompt_base, with a method that starts from one.", group=_TASKS
    )
    prompt_tuning_init_task: str | None = setting(
        None, "Task of the source prompt, by name or number, with EXACT_SOURCE_TASK.", group=_TASKS
    )
    num_ranks: int | None = setting(
        None, "Rank of a multitask prompt's task matrices; by default 1.", least=1, group=_TASKS
    )
    output_model_types: tuple[str, ...] | None = setting(
        None,
        "Submodules that get the prompt: DECODER for causal models; ENCODER (the default), "
        "DECODER or both for seq2seq models.",
        group=_PROMPT,
    )
    placement: Literal["prefix", "after_bos", "suffix", "chat_system"] = setting(
        "prefix",
        "Placement in the input: prefix (before it, as in PEFT), after_bos, suffix (after it), "
        "chat_system (in the system turn of the chat template).",
        group=_PROMPT,
    )
    parameterization: Literal["direct", "low_rank", "ulpt", "residual", "superpos"] = setting(
        "direct",
        "Reparameterisation in training: direct (the embeddings), low_rank, ulpt, residual or superpos (mixtures "
        "of sampled embeddings); all are saved as embeddings.",
        group=_PROMPT,
    )
    parameterization_rank: int | None = setting(
        None, "Rank of low_rank and ulpt; embeddings that superpos mixes, by default 128.", least=1, group=_PROMPT
    )
    prompt_sees_input: bool = setting(
        True,
        "Let the prompt attend to the input in an encoder, as PEFT does; without it the prompt "
        "is computed once for all inputs, and PEFT cannot load it.",
        group=_PROMPT,
    )
    task_matrix_init: Literal["ones", "normal"] | None = setting(
        None,
        "First value of a multitask prompt's task matrices: ones (the default), or normal (near zero, as in PEFT).",
        group=_TASKS,
    )
    encoder_reparameterization_type: Literal["MLP", "LSTM"] | None = setting(
        None, "Network that makes the virtual tokens: MLP (the default) or LSTM.", group=_P_TUNING
    )
    encoder_hidden_size: int | None = setting(
        None,
        "Inner width of the network, also of a prefix's projection; by default the width of what it makes.",
        group=_P_TUNING,
    )
    encoder_num_layers: int | None = setting(None, "Layers of the LSTM; by default 2.", group=_P_TUNING)
    encoder_dropout: float | None = setting(
        None, "Dropout between the LSTM's layers; by default 0.", group=_P_TUNING
    )
    prefix_projection: bool = setting(
        False, "Train a network that makes the keys and values, instead of these.", group=_PREFIX
    )
    init_weights: Literal["zero"] | None = setting(None, "Start the keys and values at zero.", group=_PREFIX)
    prefix_tuning_init_text: str | None = setting(
        None, "Text whose keys and values the prefix starts at.", group=_PREFIX
    )
    freeze_first_token: bool = setting(
        False, "Do not train the first token of the initial text, the attention sink.", group=_PREFIX
    )
    num_frozen_tokens: int | None = setting(
        None, "Virtual tokens at the start that are not trained; by default 1.", group=_CARTRIDGE
    )
    cartridge_init_text: str | None = setting(
        None, "Text whose keys and values the cartridge starts at.", group=_CARTRIDGE
    )
    opt_weighted_loss_type: Literal["none", "decay"] | None = setting(
        None,
        "Weights of the context's labels in the loss: none (the default), or decay (older ones less).",
        group=_CPT,
    )
    opt_loss_decay_factor: float | None = setting(
        None, "Weight of each label relative to the next one, with decay.", group=_CPT
    )
    opt_projection_epsilon: float | None = setting(
        None, "Largest norm of an input token's move, times sqrt(H / 2048); by default 0.1.", group=_CPT
    )
    opt_projection_format_epsilon: float | None = setting(
        None, "The same for tokens of the template; by default 0.1.", group=_CPT
    )

    def __post_init__(self) -> None:
        """Refuse wrong types and, with caikit's names of initialisations, what one of them would ignore."""
        method = self.prompt_tuning_init_method
        if isinstance(method, Enum):
            object.__setattr__(self, "prompt_tuning_init_method", _PEFT_NAMES.get(method.value, method.value))
        if isinstance(self.output_model_types, list):
            object.__setattr__(self, "output_model_types", tuple(self.output_model_types))
        if isinstance(self.prompt_tuning_init_task, int):
            object.__setattr__(self, "prompt_tuning_init_task", str(self.prompt_tuning_init_task))
        if not isinstance(self.output_model_types, str):  # refused by the configuration
            check(self)
        self._check_initialisation()

    @property
    def from_source(self) -> bool:
        """Whether the prompt starts from a source prompt."""
        return self.prompt_tuning_init_method in SOURCE_METHODS

    def given(self) -> Iterator[str]:
        """Yield the names of the fields that are not at their default."""
        for item in fields(self):
            if getattr(self, item.name) != default_of(item):
                yield item.name

    def _check_initialisation(self) -> None:
        method, given = self.prompt_tuning_init_method, set(self.given())
        for name, methods in _NEEDS.items():
            if name in given and method not in methods:
                ignored = f" with prompt_tuning_init_method {method}" if method else ""
                raise ConfigError(
                    f"{name} would be ignored{ignored}; set prompt_tuning_init_method "
                    f"{' or '.join(methods)}, or leave it out"
                )
            if name not in given and method in methods and name in _OF_A_SOURCE:
                raise ConfigError(
                    f"prompt_tuning_init_method {method} needs a {name}; `softprompt sources list` "
                    "shows the source prompts there are, and their tasks"
                )
