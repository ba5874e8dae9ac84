"""Source prompts: where they lie, what each is, and whether it fits a base.

A source is a folder in PEFT's layout (with our ``softprompt.json`` or without), or a bare file of
``prompt_embeddings``, ``prefix_task_cols`` and ``prefix_task_rows`` as caikit keeps them. All of a site
lie below one folder, ``SOURCE_PROMPT_BASE``, and are named by their path in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from softprompt.artifacts import PICKLED_WEIGHTS_NAME, WEIGHTS_NAME, load_adapter, source_of
from softprompt.backbone import Base, Fingerprint
from softprompt.errors import ConfigError, SoftPromptError, nearest, no_folder
from softprompt.prompts import (
    CONFIG_NAME,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PeftType,
    Placement,
    PromptLearningConfig,
)

VARIABLE = "SOURCE_PROMPT_BASE"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_DEPTH = 8
"""Levels of folders that are looked through."""


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What is known of a source prompt without its base.

    Attributes:
        name: Path below the folder of source prompts.
        weights: File that holds its tensors.
        tasks: Names of its tasks, their numbers where it has no names; none for a plain prompt.
        virtual_tokens: Length (P times the parts of the model it feeds).
        ranks: Rank (R) of the task matrices, 0 for a plain prompt.
        width: Width (H).
        base_model: Name of the base it was made for, where that is on record.
        fingerprint: That base's fingerprint, where it is on record.
        metrics: Metrics on record.
        problem: Why it cannot be used at all; empty for a sound one.
    """

    name: str
    weights: Path
    tasks: tuple[str, ...] = ()
    virtual_tokens: int = 0
    ranks: int = 0
    width: int = 0
    base_model: str | None = None
    fingerprint: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    def misfit(self, width: int, base: Fingerprint) -> str:
        """Return why the source does not fit a base of a width; empty where it does."""
        if self.problem:
            return self.problem
        if self.width != width:
            return f"it is {self.width} wide, the base's embeddings are {width}"
        if self.fingerprint is not None:
            made_for = Fingerprint.from_dict(self.fingerprint)
            reason = made_for.differs(base)
            if reason is not None:
                return f"it was made for {self.base_model}, another model ({reason})"
        return ""

    def check(self, config: PromptLearningConfig, base: Base) -> None:
        """Refuse to start a prompt of a configuration on a base from this source.

        Raises:
            ConfigError: it is of another base or another size; names the setting, and what the source has.
        """
        misfit = self.misfit(base.facts.token_dim, base.fingerprint)
        if misfit:
            raise ConfigError(
                f"the source prompt {self.name} does not fit {base.name}: {misfit}; `softprompt "
                "sources list --base-model` shows which do"
            )
        needed = (config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1)
        if self.virtual_tokens != needed:
            raise ConfigError(
                f"the source prompt {self.name} has {self.virtual_tokens} virtual tokens, this "
                f"prompt needs {needed}; set num_virtual_tokens to the source's"
            )
        assert isinstance(config, MultitaskPromptTuningConfig)
        init = MultitaskPromptTuningInit(config.prompt_tuning_init)
        if init is MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            return
        if not self.ranks:
            raise ConfigError(
                f"the source prompt {self.name} is a plain prompt without tasks, which "
                f"{init} takes; use ONLY_SOURCE_SHARED"
            )
        if self.ranks != config.num_ranks:
            raise ConfigError(
                f"the source prompt {self.name} has num_ranks {self.ranks}, this prompt "
                f"{config.num_ranks}; set num_ranks to the source's, or use ONLY_SOURCE_SHARED"
            )

    def task_number(self, task: str | None) -> int:
        """Return the number of a task given by name or number; 0 where none is.

        Raises:
            ConfigError: there is no such task.
        """
        if task is None:
            return 0
        if task in self.tasks:
            return self.tasks.index(task)
        if task.isdecimal() and int(task) < len(self.tasks):
            return int(task)
        known = ", ".join(self.tasks) or "none, it is a plain prompt"
        raise ConfigError(
            f"prompt_tuning_init_task {task!r} is no task of the source prompt {self.name}"
            f"{nearest(task, self.tasks)}; it has {known}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        made_for = None if self.fingerprint is None else self.fingerprint["short"]
        return asdict(self) | {"weights": str(self.weights), "tasks": list(self.tasks), "fingerprint": made_for}


def source_folder(given: str | None) -> Path | None:
    """Return the folder of source prompts: the setting, or the environment's; None without any.

    Raises:
        ConfigError: it is not a folder.
    """
    name = given or os.environ.get(VARIABLE)
    if not name:
        return None
    if not Path(name).is_dir():
        where = "source_prompt_base" if given else VARIABLE
        found = no_folder(name) or f"{name} is none"
        raise ConfigError(f"{where} must be a folder of source prompts, {found}; check it")
    return Path(name)


def list_sources(folder: Path) -> list[SourceInfo]:
    """Return every source prompt below a folder, by name; unreadable ones say why."""
    return [_described(path, str(path.relative_to(folder))) for path in _places(folder)]


def find_source(name: str, given: str | None) -> SourceInfo:
    """Return the source prompt that a setting names.

    Args:
        name: Path relative to the folder of source prompts; without such a folder an absolute path.
        given: The setting ``source_prompt_base``.

    Raises:
        ConfigError: there is no such source, it leads out of the folder, or it cannot be read.
    """
    folder = source_folder(given)
    if folder is None and not Path(name).is_absolute():
        raise ConfigError(
            f"prompt_tuning_init_source_model {name!r} is relative to the folder of source prompts; "
            f"set source_prompt_base, or the environment's {VARIABLE}"
        )
    path = Path(name) if folder is None else folder / name
    if folder is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ConfigError(
            f"prompt_tuning_init_source_model {name!r} leads out of the folder of source prompts "
            f"{folder}; name one inside it"
        )
    if not path.exists():
        known = [] if folder is None else [source.name for source in list_sources(folder)]
        where = f"there; {folder} holds {', '.join(known) or 'none'}" if folder else "there"
        raise ConfigError(f"prompt_tuning_init_source_model {name!r} is not {where}{nearest(name, known)}")
    found = _described(path, name)
    if found.problem:
        raise ConfigError(f"the source prompt {name} cannot be used: {found.problem}")
    return found


def _places(folder: Path, level: int = 0) -> Iterator[Path]:
    """Yield folders in PEFT's layout and bare files, in the order of their names."""
    try:
        found = sorted(folder.iterdir())
    except OSError:  # which its description says
        found = []
        yield folder
    for path in found:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if os.path.isfile(path / CONFIG_NAME):
                yield path
            elif level < _DEPTH and not path.is_symlink():  # which may lead round and round
                yield from _places(path, level + 1)
        elif path.suffix in SUFFIXES:
            yield path


def _described(path: Path, name: str) -> SourceInfo:
    weights = path
    if path.is_dir():
        weights = path / WEIGHTS_NAME
        weights = weights if weights.is_file() else path / PICKLED_WEIGHTS_NAME
    try:
        return _read(path, weights, name)
    except (SoftPromptError, OSError) as error:
        return SourceInfo(name, weights, problem=str(error))


_KINDS = frozenset(
    {PeftType.PROMPT_TUNING, PeftType.EXTENDED_PROMPT_TUNING, PeftType.MULTITASK_PROMPT_TUNING, PeftType.P_TUNING}
)
"""Methods whose file holds virtual tokens of the input."""


def _check_stands_in_front(config: Mapping[str, Any]) -> None:
    """Refuse what is no virtual tokens in front of the input, where a multitask prompt stands."""
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise ConfigError(f"it is a {kind} prompt; a source is one of {', '.join(sorted(_KINDS))}")
    placement = config.get("placement", Placement.PREFIX)
    if placement != Placement.PREFIX:
        raise ConfigError(f"it has placement {placement}, a multitask prompt stands in front")
    if config.get("output_model_types") == ["DECODER"]:
        raise ConfigError("it stands before the decoder's input alone, a multitask prompt does not")


def _read(path: Path, weights: Path, name: str) -> SourceInfo:
    stored = load_adapter(path) if path.is_dir() else None
    if stored is not None:
        _check_stands_in_front(stored.config)
    reading = MultitaskPromptTuningConfig(
        prompt_tuning_init="ONLY_SOURCE_SHARED", prompt_tuning_init_state_dict_path=str(weights)
    )
    found = source_of(reading)
    assert found is not None
    factors = found.matrices
    count = 0 if factors is None else factors.cols.shape[0]
    recorded: dict[str, Any] = {}
    tasks = tuple(map(str, range(count)))
    if stored is not None:
        recorded["base_model"] = stored.config.get("base_model_name_or_path")
        if stored.manifest is not None:
            tasks = (stored.manifest.tasks or tasks)[:count]
            recorded["base_model"] = stored.manifest.base_model
            recorded["fingerprint"] = stored.manifest.base_fingerprint
            recorded["metrics"] = stored.manifest.metrics
    return SourceInfo(
        name,
        weights,
        tasks,
        found.embeddings.shape[0],
        0 if factors is None else factors.cols.shape[2],
        found.embeddings.shape[1],
        **recorded,
    )
