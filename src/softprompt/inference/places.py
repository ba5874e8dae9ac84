"""Where in a model the rows of a prompt go: before the source, before the answer, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt.engine.rows import EngineRow


@dataclass(frozen=True, slots=True)
class Places:
    """The parts of a model that a prompt feeds.

    A prompt for both parts of a seq2seq model is ``[2P, H]``: its first half goes to the encoder,
    its second half to the decoder.
    """

    source: bool = True
    decoder: bool = False

    @classmethod
    def of(cls, output_model_types: Sequence[str] | None, *, seq2seq: bool) -> Places:
        """Return the places that caikit's ``output_model_types`` names; None is the usual one."""
        if not seq2seq or output_model_types is None:
            return cls()
        return cls("ENCODER" in output_model_types, "DECODER" in output_model_types)

    @property
    def submodules(self) -> int:
        """How many parts of the model the prompt feeds (S)."""
        return int(self.source) + int(self.decoder)

    def parts(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return what an engine is given for prompts ``[S·P, H]``: S prompts ``[P, H]`` for each."""
        return [part for value in values for part in value.tensor_split(self.submodules)]

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
