"""Which parts of a model a prompt feeds, and how its value is divided among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt.attach.lending import PromptParts
from softprompt.backbone import Facts
from softprompt.engine import EngineRow, is_keys_and_values
from softprompt.prompts import PromptLearningConfig

ENCODER, DECODER = "ENCODER", "DECODER"


@dataclass(frozen=True, slots=True)
class Places:
    """The parts of a model that a prompt feeds: before the source, before the answer, or both.

    A prompt for both parts of a seq2seq model is ``[2P, H]``: its first half goes to the encoder,
    its second half to the decoder. Keys and values stay whole.
    """

    source: bool = True
    decoder: bool = False

    @classmethod
    def of(cls, output_model_types: Sequence[str] | None, *, seq2seq: bool) -> Places:
        """Return the places that caikit's ``output_model_types`` names; None is the usual one."""
        if not seq2seq or output_model_types is None:
            return cls()
        return cls(ENCODER in output_model_types, DECODER in output_model_types)

    @property
    def submodules(self) -> int:
        """How many parts of the model the prompt feeds (S)."""
        return int(self.source) + int(self.decoder)

    def split(self, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the source's and the decoder's part of a prompt, None where it feeds nothing."""
        if is_keys_and_values(value) or not self.decoder:
            return value, None
        if not self.source:
            return None, value
        half = value.shape[0] // 2
        return value[:half], value[half:]

    def parts(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return what an engine is given for prompts ``[S·P, H]``: S prompts ``[P, H]`` for each."""
        return [part for value in values for part in self.split(value) if part is not None]

    def source_index(self, number: int) -> int:
        """Return where in ``parts`` the source's part of prompt ``number`` is, -1 for nowhere."""
        return number * self.submodules if self.source else -1

    def decoder_index(self, number: int) -> int:
        """Return where in ``parts`` the decoder's part of prompt ``number`` is, -1 for nowhere."""
        return number * self.submodules + int(self.source) if self.decoder else -1

    def indices(self, start: int) -> tuple[int, int]:
        """Return where a prompt's source's and decoder's parts are in a list it begins at ``start``."""
        source, decoder = self.source_index(0), self.decoder_index(0)
        return (
            source if source < 0 else start + source,
            decoder if decoder < 0 else start + decoder,
        )

    def row(self, row: EngineRow, number: int) -> EngineRow:
        """Return a row that stands behind prompt ``number``."""
        return EngineRow(
            row.source,
            row.target,
            self.source_index(number),
            row.at,
            self.decoder_index(number),
        )


USUAL = Places()
"""In front of what the model reads, as in PEFT."""


def model_types_of(config: PromptLearningConfig, facts: Facts) -> tuple[str, ...]:
    """Return the parts that get a prompt, caikit's ``output_model_types``.

    A causal model has one input, which is its decoder's. A seq2seq prompt with S = 2 feeds both.
    """
    if not facts.is_encoder_decoder:
        return (DECODER,)
    named: list[str] | None = getattr(config, "output_model_types", None)
    if named is not None:
        return tuple(named)
    return (ENCODER, DECODER) if config.num_transformer_submodules == 2 else (ENCODER,)


def places_of(config: PromptLearningConfig, facts: Facts) -> Places:
    """Return the parts of a base that an attached or completed prompt feeds."""
    return Places.of(model_types_of(config, facts), seq2seq=facts.is_encoder_decoder)


def split_value(value: Tensor, config: PromptLearningConfig, facts: Facts) -> PromptParts:
    """Return a prompt's value ``[S·P, H]``, or keys and values, by where it goes."""
    if is_keys_and_values(value):
        return PromptParts(None, prefix=value)
    return PromptParts(*places_of(config, facts).split(value))
