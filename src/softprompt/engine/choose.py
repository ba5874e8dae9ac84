"""Choosing the engine for a model: the fastest path that proves itself equal to the plain one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from softprompt.backbone import is_encoder_decoder
from softprompt.engine.expand import ExpandEngine
from softprompt.engine.forest.causal import ForestEngine
from softprompt.engine.forest.seq2seq import PackedSeq2SeqEngine
from softprompt.engine.plain import PlainEngine
from softprompt.engine.rows import Engine
from softprompt.engine.selfcheck import difference
from softprompt.errors import ConfigError, SoftPromptError, nearest

logger = logging.getLogger(__name__)


def _forest(model: PreTrainedModel, sees_input: bool) -> Engine:
    if is_encoder_decoder(model):
        return PackedSeq2SeqEngine(model, prompt_sees_input=sees_input)
    return ForestEngine(model)


def _expand(model: PreTrainedModel, sees_input: bool) -> Engine:
    return ExpandEngine(model)


_FAST: Mapping[str, Callable[[PreTrainedModel, bool], Engine]] = {
    "forest": _forest,
    "expand": _expand,
}
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


_choices: WeakKeyDictionary[PreTrainedModel, dict[bool, EngineChoice]] = WeakKeyDictionary()


def build_engine(
    model: PreTrainedModel, kind: str = "auto", *, prompt_sees_input: bool = True
) -> Engine:
    """Return the engine ``kind`` names for a model, ``auto`` for the fastest exact one.

    Args:
        model: The base model.
        kind: One of ``ENGINES``.
        prompt_sees_input: Whether an encoder's prompt attends to the input.

    Raises:
        ConfigError: If there is no such engine, or a forced one does not run this model exactly.
    """
    if kind not in ENGINES:
        raise ConfigError(
            f"engine must be one of {', '.join(ENGINES)}, got {kind!r}{nearest(kind, ENGINES)}"
        )
    if kind == "auto":
        kind = choose_engine(model, prompt_sees_input=prompt_sees_input).name
    elif kind in _FAST:
        problem = _problem(kind, model, prompt_sees_input)
        if problem is not None:
            raise ConfigError(
                f"engine {kind!r} cannot run this model: {problem}; use engine='auto'"
            )
    if kind in _FAST:
        return _FAST[kind](model, prompt_sees_input)
    return PlainEngine(model, prompt_sees_input=prompt_sees_input)


def choose_engine(model: PreTrainedModel, *, prompt_sees_input: bool = True) -> EngineChoice:
    """Return the fastest path that gives this model's plain results; remembered per model."""
    known = _choices.setdefault(model, {})
    if prompt_sees_input not in known:
        reasons = []
        chosen = "plain"
        for name in _FAST:
            problem = _problem(name, model, prompt_sees_input)
            if problem is None:
                chosen = name
                break
            reasons.append(f"{name}: {problem}")
        if chosen == "plain":
            alone = PlainEngine(model, prompt_sees_input=prompt_sees_input).why_alone()
            if alone:
                reasons.append(f"plain, row by row: padded, {alone}")
        known[prompt_sees_input] = EngineChoice(chosen, "; ".join(reasons))
        if reasons:
            logger.info("engine %s for %s (%s)", chosen, type(model).__name__, "; ".join(reasons))
    return known[prompt_sees_input]


def _problem(name: str, model: PreTrainedModel, sees_input: bool) -> str | None:
    """Return why a fast path cannot run a model, None when it passes the probe."""
    try:
        plain = PlainEngine(model, prompt_sees_input=sees_input)
        return difference(_FAST[name](model, sees_input), plain, model)
    except Exception as cause:  # whatever a model's own code raises on our inputs
        first = (str(cause).strip().splitlines() or [""])[0]
        return first if isinstance(cause, SoftPromptError) else f"{type(cause).__name__}: {first}"
