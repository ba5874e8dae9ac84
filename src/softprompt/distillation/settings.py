"""What can be set for a distillation, each with its help text; names that `tune` has mean the same here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from softprompt.errors import ConfigError
from softprompt.fields import check, from_mapping, plain, same_as, setting
from softprompt.prompts import PeftType, Placement, PromptLearningConfig, config_class
from softprompt.training import TuneSettings, tracker_names

TEXT_RATE_PER_RMS = 0.06
"""Default rate of keys and values that start at a text's, in units of their rms (see docs/distillation.md)."""

_PROMPT, _QUESTIONS, _TEACHER = "Prompt", "Questions", "Teacher"
_OPTIMISATION, _MODEL, _OUTPUT = "Optimisation", "Model and engine", "Output"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """The settings of a distillation: all but its base model, its text, its questions and its output."""

    kind: Literal["virtual-tokens", "kv"] = setting(
        "virtual-tokens",
        "What the text becomes: virtual tokens of the input (PROMPT_TUNING), or keys and values of every layer "
        "(CARTRIDGE).",
        group=_PROMPT,
    )
    num_virtual_tokens: int = setting(32, "Virtual tokens (P).", least=1, group=_PROMPT)
    start: Literal["text", "chunks", "vocabulary"] = setting(
        "text",
        "First values: the text's first tokens, pieces of it from beginning to end, or tokens drawn from the "
        "vocabulary; for kv their keys and values.",
        group=_PROMPT,
    )
    placement: Literal["auto", "prefix"] = setting(
        "auto",
        "Where virtual tokens stand: auto is the system turn of a chat, where the text stood; prefix is in "
        "front of everything, as PEFT has it.",
        group=_PROMPT,
    )
    self_study: int | None = setting(
        None, "Questions that the base model asks about the text itself.", least=1, group=_QUESTIONS
    )
    held_out: float = setting(
        0.1,
        "Questions kept apart to validate on and to report, as a share of the others: drawn from those given, or "
        "asked in other ways.",
        least=0,
        most=0.9,
        group=_QUESTIONS,
    )
    distractors: tuple[str, ...] = setting(
        (),
        "Other kv prompt of the same base that stands before the trained one in about every second batch, frozen, "
        "so that the two can be composed.",
        group=_PROMPT,
    )
    input_field: str | None = setting(None, "Column of the questions.", group=_QUESTIONS)
    output_field: str | None = setting(None, "Column of their answers.", group=_QUESTIONS)
    verbalizer: str = setting(
        "{{input}}", "Template of a question, and of the examples, from a record's fields.", group=_QUESTIONS
    )
    chat: bool | None = setting(
        None,
        "Put the text into the system turn and the questions into user turns of the base's chat template; by "
        "default where it has one, and the text is no examples.",
        group=_TEACHER,
    )
    task: Literal["classification", "generation"] | None = setting(
        None, "Kind of the examples' targets; by default inferred from them.", group=_TEACHER
    )
    chunk_tokens: int | None = setting(
        None,
        "Maximum length of a document's chunks, in tokens; by default a document that fits is one, others are cut "
        "to 2048 or what fits.",
        least=16,
        most=4096,
        group=_TEACHER,
    )
    top_k: int = setting(
        20, "Most likely tokens of the teacher that are kept; all others count as one.", least=1, group=_TEACHER
    )
    label_weight: float = setting(
        0.5,
        "Weight of given answers themselves against what the teacher predicts for them.",
        least=0,
        most=1,
        group=_TEACHER,
    )
    choice_weight: float | None = setting(
        None,
        "Weight of the teacher's choice among the examples' labels; by default 1 where they have labels.",
        least=0,
        most=1e6,
        group=_TEACHER,
    )
    max_source_length: int = setting(256, "Maximum length of a question, in tokens.", least=1, group=_QUESTIONS)
    max_target_length: int = setting(128, "Maximum length of an answer, in tokens.", least=1, group=_QUESTIONS)
    num_epochs: int = setting(8, "Number of training epochs.", least=1, group=_OPTIMISATION)
    max_steps: int | None = same_as(TuneSettings, "max_steps")
    learning_rate: float | None = setting(
        None,
        f"Peak learning rate; by default tune's, but for kv that starts at the text {TEXT_RATE_PER_RMS} x the rms "
        "of the base model's keys and values.",
        above=0,
        most=1e6,
        group=_OPTIMISATION,
    )
    batch_size: int = setting(16, "Batch size, in questions.", least=1, group=_OPTIMISATION)
    max_tokens_per_batch: int | None = same_as(TuneSettings, "max_tokens_per_batch")
    early_stopping_patience: int | None = same_as(TuneSettings, "early_stopping_patience")
    seed: int = setting(
        73, "Random seed of questions, first values and shuffling.", least=0, most=2**32 - 1, group=_OPTIMISATION
    )
    torch_dtype: str | None = same_as(TuneSettings, "torch_dtype")
    device: str | None = same_as(TuneSettings, "device")
    shard: Literal["fsdp", "tp"] | None = same_as(TuneSettings, "shard")
    engine: Literal["auto", "forest", "expand", "plain"] = setting(
        "auto", "Engine of the forward passes; see tune.", group=_MODEL
    )
    save_every: int | None = same_as(TuneSettings, "save_every")
    track: tuple[str, ...] | None = setting(None, "Tracker to send the training to; see tune.", group=_OUTPUT)
    silence_progress_bars: bool = same_as(TuneSettings, "silence_progress_bars")

    def __post_init__(self) -> None:
        """Refuse wrong values, and settings that would be ignored.

        Raises:
            ConfigError: One is wrong, or contradicts another.
        """
        check(self)
        if self.kind == "kv" and self.placement == "prefix":
            raise ConfigError("placement would be ignored with kind kv, which stands in front; leave it out")
        if self.distractors and self.kind != "kv":
            raise ConfigError("distractors would be ignored: only prompts of kind kv are composed; leave them out")
        if self.early_stopping_patience is not None and not self.held_out:
            raise ConfigError("early_stopping_patience needs held_out questions to validate on; raise held_out")
        self.tuning(self.configuration(chat=False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillSettings:
        """Build settings from names and values; ``lr`` is ``learning_rate``.

        Raises:
            ConfigError: An unknown name, a wrong value, or settings that contradict each other.
        """
        given = {"learning_rate" if name == "lr" else name: value for name, value in values.items()}
        if len(given) < len(values):
            raise ConfigError("lr and learning_rate are the same setting; give one of them")
        others = given.get("distractors", ())
        given["distractors"] = (str(others),) if isinstance(others, str | Path) else tuple(map(str, others))
        if given.get("track"):
            given["track"] = tracker_names(given["track"])
        return from_mapping(cls, given)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set as plain values; ``from_dict`` of it gives equal settings."""
        return plain(self)

    @property
    def columns(self) -> dict[str, str | None]:
        """Names of the columns of questions and examples, for ``read_records``."""
        return {"input_field": self.input_field, "output_field": self.output_field}

    def configuration(self, *, chat: bool) -> PromptLearningConfig:
        """Return the configuration of the student's prompt, its sizes not filled in yet."""
        values: dict[str, Any] = {"num_virtual_tokens": self.num_virtual_tokens}
        if self.kind == "kv":
            values["num_frozen_tokens"] = min(1, self.num_virtual_tokens - 1)
            return config_class(PeftType.CARTRIDGE)(**values)
        in_system = chat and self.placement == "auto"
        values["placement"] = Placement.CHAT_SYSTEM if in_system else Placement.PREFIX
        return config_class(PeftType.PROMPT_TUNING)(**values)

    def tuning(self, config: PromptLearningConfig) -> TuneSettings:
        """Return the settings of the student's training."""
        names = {item.name for item in fields(TuneSettings)}
        shared: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name in names
        }
        if self.kind == "kv":
            shared["init_from_records"] = False
        return TuneSettings(**shared, config=config)
