"""What can be set for a training run: caikit's parameter names, each with its help text.

Source: caikit-nlp's "Prompt Tuning Parameters" for names, meaning and documented defaults; where
its document gives no default, the one here is explained in docs/training.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from softprompt.errors import ConfigError
from softprompt.prompts.configs import PromptTuningInit
from softprompt.training.fields import about, check, from_mapping, plain

RATE_PER_RMS = 0.57
"""Default learning rate in units of the embedding's rms (measured, see docs/training.md)."""

SOURCE_METHODS = ("ONLY_SOURCE_SHARED", "AVERAGE_SOURCE")

_PEFT_INITS = {
    PromptTuningInit.RANDOM: "STANDARD_NORMAL",
    PromptTuningInit.RANDOM_SCALED: "RANDOM",
    PromptTuningInit.TEXT: "TEXT",
    PromptTuningInit.SAMPLE_VOCAB: "SAMPLE_VOCAB",
    PromptTuningInit.LABELS: "LABELS",
    PromptTuningInit.PROMPT: "PROMPT",
}

InitMethod = Literal[
    "RANDOM",
    "TEXT",
    "SAMPLE_VOCAB",
    "LABELS",
    "PROMPT",
    "STANDARD_NORMAL",
    "ONLY_SOURCE_SHARED",
    "AVERAGE_SOURCE",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """The prompt itself: how long it is and what it starts from."""

    num_virtual_tokens: int = field(
        default=20, metadata=about("Length of the prompt in virtual tokens.", least=1)
    )
    prompt_tuning_init_method: InitMethod = field(
        default="RANDOM",
        metadata=about(
            "What the prompt starts from: RANDOM (normal, at the scale of the base's embeddings), "
            "TEXT (the embeddings of prompt_tuning_init_text), SAMPLE_VOCAB (random tokens), "
            "LABELS (the class labels), PROMPT (a saved prompt), STANDARD_NORMAL (N(0,1), which is PEFT's RANDOM)."
        ),
    )
    prompt_tuning_init_text: str | None = field(
        default=None,
        metadata=about("Text to start from; only with prompt_tuning_init_method TEXT."),
    )
    prompt_tuning_init_prompt: str | None = field(
        default=None,
        metadata=about(
            "Saved prompt to start from, of any length and of this base or another; only with "
            "prompt_tuning_init_method PROMPT."
        ),
    )
    prompt_tuning_init_source_model: str | None = field(
        default=None,
        metadata=about("Source prompt of multitask tuning, which is not available yet."),
    )
    output_model_types: tuple[str, ...] | None = field(
        default=None,
        metadata=about(
            "Where the prompt goes: DECODER (causal models) or ENCODER (seq2seq models)."
        ),
    )

    prompt_sees_input: bool = field(
        default=True,
        metadata=about(
            "Let an encoder's prompt attend to the input, as PEFT does; without it the prompt is "
            "computed once for all inputs, and PEFT cannot load it."
        ),
    )

    def __post_init__(self) -> None:
        """Refuse wrong values, and combinations in which one setting would be ignored."""
        if isinstance(self.prompt_tuning_init_method, PromptTuningInit):
            # PEFT's enumeration keeps PEFT's meaning, in which RANDOM is N(0, 1).
            method = _PEFT_INITS[self.prompt_tuning_init_method]
            object.__setattr__(self, "prompt_tuning_init_method", method)
        if isinstance(self.output_model_types, list):
            object.__setattr__(self, "output_model_types", tuple(self.output_model_types))
        check(self)
        method, text = self.prompt_tuning_init_method, self.prompt_tuning_init_text
        if method in SOURCE_METHODS:
            raise ConfigError(
                f"prompt_tuning_init_method {method} needs MULTITASK_PROMPT_TUNING, which is not "
                "available yet; use RANDOM, TEXT, SAMPLE_VOCAB or LABELS"
            )
        if self.prompt_tuning_init_source_model is not None:
            raise ConfigError(
                "prompt_tuning_init_source_model would be ignored: it needs "
                "MULTITASK_PROMPT_TUNING, which is not available yet; leave it out"
            )
        if method == "TEXT" and not (text and text.strip()):
            raise ConfigError(
                "prompt_tuning_init_method TEXT needs a prompt_tuning_init_text; got "
                f"{text!r}; give a text or use RANDOM"
            )
        if method != "TEXT" and text is not None:
            raise ConfigError(
                f"prompt_tuning_init_text would be ignored with prompt_tuning_init_method {method};"
                " use TEXT or leave the text out"
            )

        self._check_prompt()

    def _check_prompt(self) -> None:
        method, prompt = self.prompt_tuning_init_method, self.prompt_tuning_init_prompt
        if method == "PROMPT" and not prompt:
            raise ConfigError(
                "prompt_tuning_init_method PROMPT needs a prompt_tuning_init_prompt; give the folder "
                "of a saved prompt, or use RANDOM"
            )
        if method != "PROMPT" and prompt is not None:
            raise ConfigError(
                f"prompt_tuning_init_prompt would be ignored with prompt_tuning_init_method {method}; "
                "use PROMPT or leave the prompt out"
            )

    def check_model_types(self, is_encoder_decoder: bool) -> None:
        """Refuse an output_model_types other than the one place this kind of model offers.

        Raises:
            ConfigError: the prompt would not go where the setting says.
        """
        place = "ENCODER" if is_encoder_decoder else "DECODER"
        if self.output_model_types not in (None, (place,)):
            kind = "seq2seq" if is_encoder_decoder else "causal"
            raise ConfigError(
                f"output_model_types of a {kind} model is ['{place}']; got "
                f"{list(self.output_model_types or ())}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """Everything a run can be told besides its base model, its data and its output."""

    tuning_type: Literal["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"] = field(
        default="PROMPT_TUNING",
        metadata=about("Kind of tuning; MULTITASK_PROMPT_TUNING is not available yet."),
    )
    tuning_config: TuningConfig = field(default_factory=TuningConfig)
    num_epochs: int = field(default=20, metadata=about("Passes over the training data.", least=1))
    learning_rate: float | None = field(
        default=None,
        metadata=about(
            f"Peak learning rate; by default {RATE_PER_RMS} x the rms of the base's embeddings.",
            above=0,
            most=1e6,
        ),
    )
    accumulate_steps: int = field(
        default=1, metadata=about("Batches whose gradients make one update.", least=1)
    )
    verbalizer: str = field(
        default="{{input}}", metadata=about("Template that turns a record into the model's input.")
    )
    batch_size: int = field(default=8, metadata=about("Rows in a batch.", least=1))
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata=about(
            "Padded tokens of a pass at most; a batch is then run in several passes of one update.",
            least=1,
        ),
    )
    max_source_length: int = field(
        default=256, metadata=about("Tokens of an input at most.", least=1)
    )
    max_target_length: int = field(
        default=128, metadata=about("Tokens of a target at most.", least=1)
    )
    task: Literal["classification", "generation"] | None = field(
        default=None, metadata=about("What targets are; by default decided from the training data.")
    )
    input_field: str | None = field(default=None, metadata=about("Column of the input text."))
    output_field: str | None = field(default=None, metadata=about("Column of the target."))
    torch_dtype: str | None = field(
        default=None, metadata=about("Data type of the base; by default its own.")
    )
    device: str | None = field(
        default=None, metadata=about("Device to train on, such as cpu or cuda:0.")
    )
    engine: Literal["auto", "forest", "expand", "plain"] = field(
        default="auto",
        metadata=about(
            "How batches are run: forest (packed, the prompt once), expand (the prompt's keys "
            "and values once), plain (padded), or auto (the fastest that is exact)."
        ),
    )
    optimizer: Literal["adamw", "adafactor"] = field(
        default="adamw", metadata=about("Optimiser of the prompt.")
    )
    weight_decay: float = field(
        default=0.0, metadata=about("Decoupled weight decay of the prompt.", least=0)
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=about("Norm to clip an update's gradient to; 0 leaves it as it is.", least=0),
    )
    schedule: Literal["linear", "cosine", "constant"] = field(
        default="linear",
        metadata=about("Course of the learning rate after the warm-up, counted in updates."),
    )
    warmup_ratio: float = field(
        default=0.06, metadata=about("Share of the updates that warm up.", least=0, most=1)
    )
    keep_dropout: bool = field(
        default=False, metadata=about("Train with the frozen base's own dropout on.")
    )
    keep_best: bool = field(
        default=True,
        metadata=about(
            "Keep the prompt of the best epoch on the validation data, not the last one."
        ),
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=about("Epochs without a better validation after which training stops.", least=1),
    )
    seed: int = field(
        default=73,
        metadata=about(
            "Seed of the initial prompt and of the order of the rows.", least=0, most=2**32 - 1
        ),
    )
    silence_progress_bars: bool = field(default=False, metadata=about("Show no progress bar."))

    def __post_init__(self) -> None:
        """Refuse wrong values."""
        if isinstance(self.tuning_config, Mapping):
            object.__setattr__(
                self, "tuning_config", from_mapping(TuningConfig, self.tuning_config)
            )
        check(self)
        if self.tuning_type == "MULTITASK_PROMPT_TUNING":
            raise ConfigError(
                "tuning_type MULTITASK_PROMPT_TUNING is not available yet; use PROMPT_TUNING"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuneSettings:
        """Build settings from names and values; ``lr`` is another name of ``learning_rate``.

        Raises:
            ConfigError: an unknown name, a wrong value, or settings that contradict each other.
        """
        values = {name: _plain_value(value) for name, value in values.items()}
        if "lr" in values:
            if "learning_rate" in values:
                raise ConfigError("lr and learning_rate are the same setting; give one of them")
            values["learning_rate"] = values.pop("lr")
        for name in values.keys() & TuningConfig.__dataclass_fields__.keys():
            raise ConfigError(f"{name} belongs in tuning_config: tuning_config={{{name!r}: ...}}")
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set as plain values: `from_dict` of it gives equal settings."""
        return plain(self)


class TuneOptions(TypedDict, total=False):
    """Keyword arguments of `tune`, for type checkers: the fields of `TuneSettings` and ``lr``."""

    tuning_type: str
    tuning_config: TuningConfig | Mapping[str, Any]
    num_epochs: int
    learning_rate: float | None
    lr: float | None
    accumulate_steps: int
    verbalizer: str
    batch_size: int
    max_tokens_per_batch: int | None
    max_source_length: int
    max_target_length: int
    task: str | None
    input_field: str | None
    output_field: str | None
    torch_dtype: Any
    device: str | None
    engine: str
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    schedule: str
    warmup_ratio: float
    keep_dropout: bool
    keep_best: bool
    early_stopping_patience: int | None
    seed: int
    silence_progress_bars: bool


def _plain_value(value: Any) -> Any:
    """Return enum members by their value and ``torch.bfloat16`` as ``"bfloat16"``."""
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return getattr(value, "value", value)
