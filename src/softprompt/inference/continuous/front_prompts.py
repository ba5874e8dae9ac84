"""Prompts in front of the inputs to score, as keys and values that are computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import facts_of
from softprompt.engine import (
    DecodeForest,
    Engine,
    EngineRow,
    ForestEngine,
    NewTokens,
    check_rows,
    is_keys_and_values,
    why_undecodable,
)
from softprompt.inference.continuous.request import PromptValue
from softprompt.inference.continuous.residents import ResidentPrompts


def reads_front(row: EngineRow) -> bool:
    """Tell whether a row may have its prompt as keys and values in front of it.

    Behind none of its own tokens nothing would predict its target.
    """
    return row.at == 0 and bool(row.source)


@final
class FrontPrompts:
    """Turns the rows ``[P, H]`` of prompts into keys and values, where that changes no score.

    Args:
        model: The base model.
        residents: Where keys and values are kept; the batcher of the same model may share them.
    """

    def __init__(self, model: PreTrainedModel, residents: ResidentPrompts) -> None:
        self._model = model
        self._facts = facts_of(model)
        self._residents = residents
        self._made: DecodeForest | None = None

    def find(self, prompt: PromptValue, rows: Sequence[EngineRow], engine: Engine) -> Tensor | None:
        """Return a prompt's keys and values ``[L, 2, A_kv, P, D]``, None where rows must be used.

        Args:
            prompt: The prompt.
            rows: The rows behind it.
            engine: What will score them.

        Raises:
            SoftPromptError: The rows cannot be run behind the prompt.
        """
        value = prompt.value
        if value is None or is_keys_and_values(value) or prompt.decoder is not None:
            return None
        if not len(value) or not self._residents.may_keep(len(value)):
            return None
        if not (prompt.sees_input and any(map(reads_front, rows)) and self._takes(engine)):
            return None
        key = (prompt.key, ())
        kept = self._residents.find(key)
        if kept is None:
            # The pass below would run into positions that the model does not have.
            mine = [replace(row, prompt=0) for row in rows]
            check_rows(self._model, self._facts, mine, [value])
            kept = self._computed(value)
            self._residents.keep(key, kept)
        return kept

    def _takes(self, engine: Engine) -> bool:
        """Tell whether keys and values can be computed, and read, exactly; probed once per model."""
        return (
            isinstance(engine, ForestEngine)
            and not why_undecodable(self._model)
            and engine.reads_keys_and_values()
        )

    def _computed(self, rows: Tensor) -> Tensor:
        forest = self._forest()
        first = forest.vocabulary
        lanes = forest.store.take(len(rows))
        assert lanes is not None, "it is empty, and holds whatever may be kept"
        (lane,) = lanes
        lane.tainted = True
        try:
            ids = tuple(range(first, first + len(rows)))
            forest.step([NewTokens(lane, ids, rows.detach(), "none")])
            return forest.store.read(lane, len(rows))
        finally:
            forest.store.release(lane)

    def _forest(self) -> DecodeForest:
        if self._made is None:
            limit = self._facts.context_length
            most = self._residents.most_tokens
            self._made = DecodeForest(
                self._model,
                most if limit is None else min(most, limit),
                ordered_weights=False,
            )
        return self._made
