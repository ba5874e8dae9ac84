"""caikit's ``tuning_config``: the prompt itself, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from softprompt.errors import ConfigError
from softprompt.fields import about, check
from softprompt.prompts import PromptTuningInit

SOURCE_METHODS = {
    "AVERAGE_SOURCE": "AVERAGE_SOURCE_TASKS",
    "AVERAGE_SOURCE_TASKS": "AVERAGE_SOURCE_TASKS",
    "EXACT_SOURCE_TASK": "EXACT_SOURCE_TASK",
    "ONLY_SOURCE_SHARED": "ONLY_SOURCE_SHARED",
}
"""Methods that start from a source prompt, and what PEFT calls each."""

INITS = {
    "RANDOM": PromptTuningInit.RANDOM_SCALED,
    "STANDARD_NORMAL": PromptTuningInit.RANDOM,
    "TEXT": PromptTuningInit.TEXT,
    "SAMPLE_VOCAB": PromptTuningInit.SAMPLE_VOCAB,
    "LABELS": PromptTuningInit.LABELS,
    "PROMPT": PromptTuningInit.PROMPT,
}
"""caikit's names of the initial rows, and ours."""

_PEFT_NAMES = {"RANDOM": "STANDARD_NORMAL", "RANDOM_SCALED": "RANDOM"}
"""PEFT's enumeration keeps PEFT's meaning, in which RANDOM is N(0, 1)."""

InitMethod = Literal[
    "RANDOM",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """The prompt itself: how long it is, where it stands, and what it starts from."""

    num_virtual_tokens: int = field(
        default=20, metadata=about("Number of virtual tokens.", least=1, group=_PROMPT)
    )
    prompt_tuning_init_method: InitMethod = field(
        default="RANDOM",
        metadata=about(
            "Initialisation: RANDOM (normal, at the scale of the base model's embeddings), TEXT "
            "(embeddings of prompt_tuning_init_text), SAMPLE_VOCAB (random tokens), LABELS (class "
            "labels), PROMPT (a saved prompt), STANDARD_NORMAL (N(0, 1), PEFT's RANDOM); from a "
            "source prompt AVERAGE_SOURCE (shared prompt and mean of its tasks), "
            "EXACT_SOURCE_TASK (one of its tasks) or ONLY_SOURCE_SHARED.",
            group=_PROMPT,
        ),
    )
    prompt_tuning_init_text: str | None = field(
        default=None,
        metadata=about("Initial text, with prompt_tuning_init_method TEXT.", group=_PROMPT),
    )
    prompt_tuning_init_special_tokens: bool = field(
        default=True,
        metadata=about(
            "Keep the tokenizer's special tokens around the initial text, as PEFT does.",
            group=_PROMPT,
        ),
    )
    prompt_tuning_init_prompt: str | None = field(
        default=None,
        metadata=about(
            "Initial prompt, of any length and of this base model or another, with "
            "prompt_tuning_init_method PROMPT.",
            group=_PROMPT,
        ),
    )
    prompt_tuning_init_source_model: str | None = field(
        default=None,
        metadata=about(
            "Source prompt, relative to source_prompt_base, with a method that starts from one.",
            group=_TASKS,
        ),
    )
    prompt_tuning_init_task: str | None = field(
        default=None,
        metadata=about(
            "Task of the source prompt, by name or number, with EXACT_SOURCE_TASK.", group=_TASKS
        ),
    )
    num_ranks: int | None = field(
        default=None,
        metadata=about(
            "Rank of a multitask prompt's task matrices; by default 1.", least=1, group=_TASKS
        ),
    )
    output_model_types: tuple[str, ...] | None = field(
        default=None,
        metadata=about(
            "Submodules that get the prompt: DECODER for causal models; ENCODER (the default), "
            "DECODER or both for seq2seq models.",
            group=_PROMPT,
        ),
    )
    placement: Literal["prefix", "after_bos", "suffix", "chat_system"] = field(
        default="prefix",
        metadata=about(
            "Placement in the input: prefix (before it, as in PEFT), after_bos, suffix (after it), "
            "chat_system (in the system turn of the chat template).",
            group=_PROMPT,
        ),
    )
    parameterization: Literal["direct", "low_rank", "ulpt", "residual"] = field(
        default="direct",
        metadata=about(
            "Reparameterisation in training: direct (the embeddings), low_rank, ulpt or residual; "
            "all are saved as embeddings.",
            group=_PROMPT,
        ),
    )
    parameterization_rank: int | None = field(
        default=None, metadata=about("Rank of low_rank and ulpt.", least=1, group=_PROMPT)
    )
    prompt_sees_input: bool = field(
        default=True,
        metadata=about(
            "Let the prompt attend to the input in an encoder, as PEFT does; without it the prompt "
            "is computed once for all inputs, and PEFT cannot load it.",
            group=_PROMPT,
        ),
    )

    def __post_init__(self) -> None:
        """Refuse wrong values, and combinations in which one setting would be ignored."""
        if isinstance(self.prompt_tuning_init_method, Enum):
            value = self.prompt_tuning_init_method.value
            object.__setattr__(self, "prompt_tuning_init_method", _PEFT_NAMES.get(value, value))
        if isinstance(self.output_model_types, str):
            raise ConfigError(
                f"output_model_types must be a list, such as ['{self.output_model_types}'], got "
                f"{self.output_model_types!r}"
            )
        if isinstance(self.output_model_types, list):
            object.__setattr__(self, "output_model_types", tuple(self.output_model_types))
        if isinstance(self.prompt_tuning_init_task, int):
            object.__setattr__(self, "prompt_tuning_init_task", str(self.prompt_tuning_init_task))
        check(self)
        self._check_text()
        self._check_prompt()
        self._check_source()
        self._check_parameterization()

    @property
    def from_source(self) -> bool:
        """Whether the prompt starts from a source prompt."""
        return self.prompt_tuning_init_method in SOURCE_METHODS

    def _check_text(self) -> None:
        method, text = self.prompt_tuning_init_method, self.prompt_tuning_init_text
        if method == "TEXT" and not (text and text.strip()):
            raise ConfigError(
                "prompt_tuning_init_method TEXT needs a prompt_tuning_init_text; got "
                f"{text!r}; give a text or use RANDOM"
            )
        if method == "TEXT":
            return
        if text is not None:
            raise ConfigError(
                f"prompt_tuning_init_text would be ignored with prompt_tuning_init_method {method};"
                " use TEXT or leave the text out"
            )
        if not self.prompt_tuning_init_special_tokens:
            raise ConfigError(
                "prompt_tuning_init_special_tokens would be ignored with prompt_tuning_init_method "
                f"{method}; use TEXT or leave it out"
            )

    def _check_prompt(self) -> None:
        method, prompt = self.prompt_tuning_init_method, self.prompt_tuning_init_prompt
        if method == "PROMPT" and not prompt:
            raise ConfigError(
                "prompt_tuning_init_method PROMPT needs a prompt_tuning_init_prompt; give the folder "
                "of a saved prompt, or use RANDOM"
            )
        if method == "PROMPT" and self.parameterization != "direct":
            raise ConfigError(
                f"prompt_tuning_init_method PROMPT starts from rows, which parameterization "
                f"{self.parameterization} cannot be given; use direct, or another method"
            )
        if method != "PROMPT" and prompt is not None:
            raise ConfigError(
                f"prompt_tuning_init_prompt would be ignored with prompt_tuning_init_method {method}; "
                "use PROMPT or leave the prompt out"
            )

    def _check_source(self) -> None:
        method, source = self.prompt_tuning_init_method, self.prompt_tuning_init_source_model
        if self.from_source and not source:
            raise ConfigError(
                f"prompt_tuning_init_method {method} needs a prompt_tuning_init_source_model; "
                "`softprompt sources list` shows those there are"
            )
        if source is not None and not self.from_source:
            raise ConfigError(
                f"prompt_tuning_init_source_model would be ignored with prompt_tuning_init_method "
                f"{method}; use AVERAGE_SOURCE, EXACT_SOURCE_TASK or ONLY_SOURCE_SHARED, or leave "
                "it out"
            )
        exact = method == "EXACT_SOURCE_TASK"
        if exact and self.prompt_tuning_init_task is None:
            raise ConfigError(
                "prompt_tuning_init_method EXACT_SOURCE_TASK needs a prompt_tuning_init_task, the "
                "name or number of a task of the source prompt"
            )
        if self.prompt_tuning_init_task is not None and not exact:
            raise ConfigError(
                f"prompt_tuning_init_task would be ignored with prompt_tuning_init_method {method};"
                " use EXACT_SOURCE_TASK or leave it out"
            )

    def _check_parameterization(self) -> None:
        kind, rank = self.parameterization, self.parameterization_rank
        ranked = kind in ("low_rank", "ulpt")
        if ranked and rank is None:
            raise ConfigError(f"parameterization {kind} needs a parameterization_rank of 1 or more")
        if rank is not None and not ranked:
            raise ConfigError(
                f"parameterization_rank would be ignored with parameterization {kind}; use "
                "low_rank or ulpt, or leave it out"
            )

    def model_types(self, is_encoder_decoder: bool) -> tuple[str, ...]:
        """Return the parts of this kind of model that get virtual tokens; a single input is ENCODER."""
        if not is_encoder_decoder or self.output_model_types is None:
            return ("ENCODER",)
        return self.output_model_types

    def check_model_types(self, is_encoder_decoder: bool) -> None:
        """Refuse an output_model_types that this kind of model does not offer.

        Raises:
            ConfigError: the prompt would not go where the setting says.
        """
        kind = "seq2seq" if is_encoder_decoder else "causal"
        allowed = (
            [["ENCODER"], ["DECODER"], ["ENCODER", "DECODER"]]
            if is_encoder_decoder
            else [["DECODER"]]
        )
        given = self.output_model_types
        if given is not None and sorted(given, reverse=True) not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ConfigError(
                f"output_model_types of a {kind} model is {choices}; got {list(given)}"
            )
        if given == ("DECODER",) and is_encoder_decoder:
            self._check_decoder_only()

    def _check_decoder_only(self) -> None:
        if self.placement != "prefix":
            raise ConfigError(
                f"placement {self.placement} would be ignored with output_model_types "
                "['DECODER']: no prompt stands in the input; leave one of them out"
            )
        if not self.prompt_sees_input:
            raise ConfigError(
                "prompt_sees_input would be ignored with output_model_types ['DECODER']: it is "
                "about the encoder's prompt; leave one of them out"
            )
