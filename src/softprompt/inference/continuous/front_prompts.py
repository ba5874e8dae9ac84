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
    why_undecodable,
)
from softprompt.inference.continuous.residents import ResidentPrompts
from softprompt.prompts import Prompt


def reads_front(row: EngineRow) -> bool:
    """Tell whether a row may have its prompt as keys and values in front of it.

    Behind none of its own tokens nothing would predict its target.
    """
    return row.at == 0 and bool(row.source)


@final
class FrontPrompts:
    """Turns virtual tokens ``[P, H]`` into keys and values, where that changes no score.

    Args:
        model: The base model.
        residents: Where keys and values are kept; the batcher of the same model may share them.
    """

    def __init__(self, model: PreTrainedModel, residents: ResidentPrompts) -> None:
        self._model = model
        self._facts = facts_of(model)
        self._residents = residents
        self._made: DecodeForest | None = None

    def in_front(self, rows: Sequence[EngineRow], engine: Engine) -> list[EngineRow]:
        """Return the rows, those that may with keys and values instead of their prompt's virtual tokens.

        Args:
            rows: The rows.
            engine: What will score them.

        Raises:
            SoftPromptError: The rows cannot be run behind their prompt.
        """
        grouped: dict[Prompt, list[EngineRow]] = {}
        for row in rows:
            if row.prompt is not None:
                grouped.setdefault(row.prompt, []).append(row)
        kept = {prompt: self._found(prompt, own, engine) for prompt, own in grouped.items()}
        found = []
        for row in rows:
            prefix = None if row.prompt is None else kept[row.prompt]
            found.append(replace(row, prompt=prefix) if prefix and reads_front(row) else row)
        return found

    def _found(self, prompt: Prompt, rows: Sequence[EngineRow], engine: Engine) -> Prompt | None:
        """Return a prompt as its keys and values, None where its virtual tokens must be run."""
        if prompt.input is None or prompt.decoder is not None:
            return None
        if not prompt.tokens or not self._residents.may_keep(prompt.tokens):
            return None
        if not (prompt.sees_input and any(map(reads_front, rows)) and self._takes(engine)):
            return None
        key = (prompt.key, ())
        kept = self._residents.find(key)
        if kept is None:
            # The pass below would run into positions that the model does not have.
            check_rows(self._model, self._facts, rows)
            kept = self._computed(prompt.input)
            self._residents.keep(key, kept)
        return Prompt(prefix=kept)

    def _takes(self, engine: Engine) -> bool:
        """Tell whether keys and values can be computed, and read, exactly; probed once per model."""
        return (
            isinstance(engine, ForestEngine)
            and not why_undecodable(self._model)
            and engine.reads_keys_and_values()
        )

    def _computed(self, tokens: Tensor) -> Tensor:
        forest = self._forest()
        first = forest.vocabulary
        lanes = forest.store.take(len(tokens))
        assert lanes is not None, "it is empty, and holds whatever may be kept"
        (lane,) = lanes
        lane.tainted = True
        try:
            ids = tuple(range(first, first + len(tokens)))
            forest.step([NewTokens(lane, ids, tokens.detach(), "none")])
            return forest.store.read(lane, len(tokens))
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
