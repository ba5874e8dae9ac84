"""Choosing the engine for a model: the fastest path that proves itself equal to the plain one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

from softprompt.backbone import Base
from softprompt.engine.forest import ForestEngine, PackedSeq2SeqEngine
from softprompt.engine.padded import ExpandEngine, PlainEngine
from softprompt.engine.predictions import Engine, HeadInput, Predictions, see_input
from softprompt.engine.probe import remembered, scoring_difference
from softprompt.engine.rows import EngineRow
from softprompt.errors import ConfigError, nearest

logger = logging.getLogger(__name__)


def _forest(base: Base) -> Engine:
    return PackedSeq2SeqEngine(base) if base.is_encoder_decoder else ForestEngine(base)


_FAST: Mapping[str, Callable[[Base], Engine]] = {"forest": _forest, "expand": ExpandEngine}
ENGINES = ("auto", *_FAST, "plain")


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The path a model runs on, and why not on a faster one.

    Attributes:
        name: The engine's name.
        reason: Why faster ones were declined, empty when none was.
    """

    name: str
    reason: str


@final
class Seq2SeqEngine(Engine):
    """Runs each kind of prompt of a seq2seq model on a path of its own.

    Prompts that see the input and prompts that do not are different passes, and a path may be exact
    for one kind only; the path of the second kind is found when such a row first comes.

    Attributes:
        name: The path of rows whose prompts see the input.
    """

    def __init__(self, base: Base, kind: str) -> None:
        """Choose the path of prompts that see the input.

        Raises:
            ConfigError: If a forced engine does not run this model exactly.
        """
        super().__init__(base)
        self._kind = kind
        self._paths = {True: _path(base, kind, sees_input=True)}
        self.name = self._paths[True].name

    def run_alike(self, rows: Sequence[EngineRow], head: HeadInput | None = None) -> Predictions:
        """Run checked rows; see ``Engine``.

        Raises:
            ConfigError: If a forced engine does not run prompts of this kind exactly.
        """
        sees_input = see_input(rows)
        if sees_input not in self._paths:
            self._paths[sees_input] = _path(self._base, self._kind, sees_input=sees_input)
        return self._paths[sees_input].run_alike(rows, head)


def build_engine(base: Base, kind: str = "auto") -> Engine:
    """Return the engine ``kind`` names for a base, ``auto`` for the fastest exact one.

    Raises:
        ConfigError: If there is no such engine, or a forced one does not run this model exactly.
    """
    if kind not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {kind!r}{nearest(kind, ENGINES)}")
    if base.is_encoder_decoder:
        return Seq2SeqEngine(base, kind)
    return _path(base, kind, sees_input=True)


def _path(base: Base, kind: str, *, sees_input: bool) -> Engine:
    """Return the engine for one kind of prompt.

    Raises:
        ConfigError: If a forced engine does not run this model exactly.
    """
    if kind == "auto":
        kind = choose_engine(base, sees_input=sees_input).name
    elif kind in _FAST:
        problem = _problem(kind, base, sees_input)
        if problem:
            raise ConfigError(f"engine {kind!r} cannot run this model: {problem}; use engine='auto'")
    return _FAST[kind](base) if kind in _FAST else PlainEngine(base)


def choose_engine(base: Base, *, sees_input: bool = True) -> EngineChoice:
    """Return the fastest path that gives this model's plain results; probed once.

    Args:
        base: The base.
        sees_input: Whether an encoder's prompts attend to the input.
    """
    name = f"engine, {_prompts(sees_input)}"
    if name not in base.found:
        choice = base.found[name] = _chosen(base, sees_input)
        if choice.reason:
            architecture = base.facts.architecture
            logger.info("engine %s for %s (%s)", choice.name, architecture, choice.reason)
    return cast(EngineChoice, base.found[name])


def _chosen(base: Base, sees_input: bool) -> EngineChoice:
    reasons: list[str] = []
    for name in _FAST:
        problem = _problem(name, base, sees_input)
        if not problem:
            return EngineChoice(name, "; ".join(reasons))
        reasons.append(f"{name}: {problem}")
    alone = PlainEngine(base).why_alone(sees_input)
    if alone:
        reasons.append(f"plain, row by row: padded, {alone}")
    return EngineChoice("plain", "; ".join(reasons))


def _problem(name: str, base: Base, sees_input: bool) -> str:
    """Return why a fast path does not run a model exactly, empty where it does."""

    def find() -> str:
        candidate, plain = _FAST[name](base), PlainEngine(base, trusted=True)
        return scoring_difference(candidate, plain, base, sees_input=sees_input)

    return remembered(base, f"{name} engine, {_prompts(sees_input)}", find)


def _prompts(sees_input: bool) -> str:
    return f"prompts that {'' if sees_input else 'do not '}see the input"
