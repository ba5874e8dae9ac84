"""The keyword arguments of `tune`: their types, for type checkers and editors, and the short names of some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from softprompt.errors import ConfigError, nearest
from softprompt.training.configuration import tuning_type_named
from softprompt.training.tuning_config import TuningConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from softprompt.data import LabelNames
    from softprompt.prompts import PromptLearningConfig

ALIASES = ("lr", "method", "init")
"""Other names of learning_rate, tuning_type and tuning_config's prompt_tuning_init_method."""
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
_INIT = "prompt_tuning_init_method"


class TuneOptions(TypedDict, total=False):
    """Keyword arguments of `tune`, for type checkers: the fields of `TuneSettings`, and the aliases."""

    method: str
    init: str
    tuning_type: str
    tuning_config: TuningConfig | Mapping[str, Any]
    config: PromptLearningConfig | Mapping[str, Any] | None
    num_epochs: int
    max_steps: int | None
    learning_rate: float | str | None
    lr: float | str | None
    task_learning_rate: float | None
    task_sampling: str | None
    distillation_weight: float | None
    init_from_records: bool
    demonstrations: int | None
    leave_one_out: bool
    token_dropout: float
    context_records: int | None
    accumulate_steps: int
    verbalizer: str
    task_verbalizers: Mapping[str, str] | None
    batch_size: int
    max_tokens_per_batch: int | None
    max_source_length: int
    max_target_length: int
    task: str | None
    train_on: str | None
    input_field: str | None
    output_field: str | None
    label_names: LabelNames | None
    validation_split: float | None
    limit: int | None
    source_prompt_base: str | None
    torch_dtype: Any
    device: str | None
    shard: str | None
    engine: str
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    schedule: str
    warmup_ratio: float
    choice_weight: float | None
    keep_dropout: bool
    keep_best: bool
    early_stopping_patience: int | None
    seed: int
    seeds: int
    restarts: int
    save_every: int | None
    track: str | Sequence[str] | None
    silence_progress_bars: bool


def full_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with ``lr``, ``method`` and ``init`` under the names that they stand for.

    Raises:
        ConfigError: One is given under both names, or there is no such method.
    """
    found = dict(values)
    if (init := found.pop("init", None)) is not None:
        tuning = found.get("tuning_config") or {}
        if isinstance(tuning, TuningConfig):
            tuning = {name: getattr(tuning, name) for name in tuning.given()}
        if _INIT in tuning:
            raise ConfigError(f"init={init!r} and {_INIT}={tuning[_INIT]!r} are the same setting; give one of them")
        found["tuning_config"] = {**tuning, _INIT: str(init).upper()}
    for short, name in (("lr", "learning_rate"), ("method", "tuning_type")):
        if found.get(short) is None:
            found.pop(short, None)
            continue
        value = found.pop(short)
        if name in found:
            raise ConfigError(
                f"{short}={value!r} and {name}={found[name]!r} are the same setting; give one of them"
            )
        found[name] = tuning_type_named(value) if short == "method" else value
    return found


def tracker_names(given: object) -> tuple[str, ...]:
    """Return the names of trackers, which may be a list with commas.

    Raises:
        ConfigError: There is no such tracker.
    """
    words = list(given) if isinstance(given, (list, tuple)) else [given]
    names = tuple(dict.fromkeys(name.strip() for word in words for name in str(word).split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"track is one of {', '.join(TRACKERS)}; got {name!r}{nearest(name, TRACKERS)}")
    return names
