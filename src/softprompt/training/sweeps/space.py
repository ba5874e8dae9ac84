"""What a sweep tries: rates, lengths, initialisations and methods, and what each choice of them means."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from softprompt.errors import ConfigError
from softprompt.fields import check, plain, setting
from softprompt.training import METHODS, TuneSettings, has_setting, tuning_type_named

_GROUP, _INIT, _LENGTH = "Sweep", "prompt_tuning_init_method", "num_virtual_tokens"
TRIALS = 12
"""Candidates that Optuna proposes, where their number is not given."""
_OF_INIT = {
    "prompt_tuning_init_text": ("TEXT", "AUTO"),
    "prompt_tuning_init_special_tokens": ("TEXT", "AUTO"),
    "prompt_tuning_init_prompt": ("PROMPT",),
}
"""Settings of a run that go with some of its initialisations only."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """What a sweep tries, and how. A list is several texts, or one with commas."""

    learning_rates: tuple[str, ...] = setting(
        ("x0.1", "x0.3", "x1", "x3"), "Learning rates: numbers, or x0.3 for 0.3 times the default.", group=_GROUP
    )
    lengths: tuple[str, ...] = setting((), "Numbers of virtual tokens; by default the run's.", group=_GROUP)
    inits: tuple[str, ...] = setting(
        (), "Initialisations, as --prompt-tuning-init-method has them; by default the run's.", group=_GROUP
    )
    methods: tuple[str, ...] = setting((), "Methods; by default the run's.", group=_GROUP)
    candidates: int | None = setting(
        None,
        f"Most candidates, drawn from all combinations with --seed; by default all, of Optuna's {TRIALS}.",
        least=1,
        group=_GROUP,
    )
    eta: int = setting(3, "One in this many candidates goes on from a rung to the next.", least=2, group=_GROUP)
    rungs: int | None = setting(
        None, "Rungs; by default as many as leave one candidate for the last.", least=1, group=_GROUP
    )
    driver: Literal["grid", "optuna"] = setting(
        "grid", "Who proposes candidates: the grid of all combinations, or Optuna (extra sweep).", group=_GROUP
    )

    def __post_init__(self) -> None:
        """Make lists of texts of what was given, and refuse wrong values."""
        for name in ("learning_rates", "lengths", "inits", "methods"):
            value = getattr(self, name)
            words = [value] if isinstance(value, str | int | float) else value
            parts = [part.strip() for word in words for part in str(word).split(",")]
            object.__setattr__(self, name, tuple(dict.fromkeys(filter(None, parts))))
        check(self)
        for rate in self.learning_rates:
            if _factor_or_rate(rate) is None:
                raise ConfigError(f"learning_rates takes numbers above 0, or x0.3; got {rate!r}")
        if bad := [each for each in self.lengths if not each.isdecimal() or not int(each)]:
            raise ConfigError(f"lengths takes numbers of virtual tokens; got {', '.join(bad)}")
        for method in self.methods:
            tuning_type_named(method)


def _factor_or_rate(text: str) -> float | None:
    found = re.fullmatch(r"x?(\d*\.?\d+(?:e[+-]?\d+)?)", text)
    return float(found[1]) or None if found else None


@final
@dataclass(frozen=True, slots=True)
class Combination:
    """One candidate; None is what its method does not have.

    Attributes:
        method: Method.
        init: Initialisation.
        length: Number of virtual tokens.
        learning_rate: A number, or ``x0.3`` for 0.3 times the method's default.
    """

    method: str
    init: str | None
    length: int | None
    learning_rate: str

    @property
    def factor(self) -> float | None:
        """What the default learning rate is multiplied with; None where the rate is absolute."""
        return _factor_or_rate(self.learning_rate) if self.learning_rate.startswith("x") else None

    def settings(self, run: TuneSettings) -> TuneSettings:
        """Return the settings of a run with this choice, a relative learning rate left out.

        Raises:
            ConfigError: They do not go together.
        """
        method, values = METHODS[self.method], run.to_dict()
        tuning = {name: value for name, value in plain(run.tuning_config).items() if has_setting(method, name)}
        tuning |= {} if self.length is None else {_LENGTH: self.length}
        tuning |= {} if self.init is None else {_INIT: self.init}
        tuning = {k: v for k, v in tuning.items() if k not in _OF_INIT or self.init in _OF_INIT[k]}
        values |= {"tuning_type": method, "tuning_config": tuning}
        if self.factor is None:
            values["learning_rate"] = float(self.learning_rate)
        return TuneSettings.from_dict(values)


def grid_of(run: TuneSettings, sweep: SweepSettings) -> list[Combination]:
    """Return the combinations to try, each once, or as many of them drawn with the run's seed as are wanted.

    Raises:
        ConfigError: The settings of a combination do not go together.
    """
    found = list(dict.fromkeys(_combinations(run, sweep)))
    if sweep.driver == "grid" and sweep.candidates is not None and sweep.candidates < len(found):
        drawn = random.Random(f"sweep {run.seed}").sample(range(len(found)), sweep.candidates)
        found = [found[i] for i in sorted(drawn)]
    for choice in found:
        choice.settings(run)
    return found


def _combinations(run: TuneSettings, sweep: SweepSettings) -> Iterator[Combination]:
    names = {tuning_type: name for name, tuning_type in METHODS.items()}
    methods = sweep.methods or (names[run.tuning_type],)
    inits = sweep.inits or (run.tuning_config.prompt_tuning_init_method,)
    lengths = sweep.lengths or (str(run.tuning_config.num_virtual_tokens),)
    for method, init, length, rate in itertools.product(methods, inits, lengths, sweep.learning_rates):
        kind = METHODS[method]
        own_length = has_setting(kind, _LENGTH) and (sweep.lengths or run.demonstrations is None)
        yield Combination(
            method,
            init=init if has_setting(kind, _INIT) else None,
            length=int(length) if own_length else None,
            learning_rate=rate,
        )


def refuse_ignored(run: TuneSettings) -> None:
    """Refuse settings of a run that a sweep would ignore.

    Raises:
        ConfigError: There is one.
    """
    if run.config is not None:
        raise ConfigError("a sweep makes the configurations; give tuning_config instead of config")
    if run.learning_rate is not None:
        raise ConfigError("learning_rate would be ignored by a sweep; give learning_rates, or leave it out")
    if run.seeds > 1 or run.restarts:
        name = "seeds" if run.seeds > 1 else "restarts"
        raise ConfigError(f"{name} would be ignored by a sweep; leave it out, and tune with what the sweep finds")


def optuna_of(run: TuneSettings, sweep: SweepSettings) -> Any:
    """Return Optuna's study of the same space, seeded with the run's seed.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            'driver optuna needs Optuna, it is not installed: pip install "softprompt[sweep]", or use driver grid'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=run.seed, n_startup_trials=4)
    return optuna.create_study(direction="maximize", sampler=sampler)


def suggested(trial: Any, choices: list[Combination]) -> Combination:
    """Return what a trial of Optuna suggests within the space of all combinations.

    Learning rates of one kind, relative or absolute, are suggested between the least and the largest of them.
    """
    rates = list(dict.fromkeys(each.learning_rate for each in choices))
    before = "x" if rates[0].startswith("x") else ""
    numbers = [float(rate.removeprefix("x")) for rate in rates]
    if len(rates) > 1 and len({rate.startswith("x") for rate in rates}) == 1:
        rate = f"{before}{trial.suggest_float('learning_rate', min(numbers), max(numbers), log=True):.4g}"
    else:
        rate = trial.suggest_categorical("learning_rate", rates)
    kinds: Mapping[str, Combination] = {f"{c.method}, {c.init}, {c.length}": c for c in choices}
    return replace(kinds[trial.suggest_categorical("prompt", list(kinds))], learning_rate=rate)
