"""The vocabulary tokens that lie nearest to each virtual token.

A diagnostic, not an explanation: a row between two tokens need mean neither of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

NEAREST = 3
_CHUNK_ROWS = 16_384


class Vocabulary(Protocol):
    """The part of a tokenizer that naming table rows needs."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """Return the token of one id."""
        ...

    def decode(self, token_ids: list[int]) -> Any:
        """Return the text of token ids."""
        ...


@dataclass(frozen=True, slots=True)
class NearToken:
    """A vocabulary token close to a virtual token; ``cosine`` is between -1 and 1."""

    token_id: int
    token: str
    cosine: float


def nearest_tokens(
    prompt: Tensor, table: Tensor, tokenizer: Vocabulary, count: int = NEAREST
) -> tuple[tuple[NearToken, ...], ...]:
    """Return, for each row of ``prompt`` ``[R, H]``, the tokens of highest cosine, best first.

    Rows of ``table`` ``[V, H]`` past the tokenizer's length are padding and are left out.
    """
    units = torch.nn.functional.normalize(prompt.detach().float(), dim=1)
    vocabulary = min(table.shape[0], len(tokenizer))
    best = torch.empty(prompt.shape[0], 0)
    ids = torch.empty(prompt.shape[0], 0, dtype=torch.int64)
    # Chunks: a float32 copy of a large bf16 table would take gigabytes.
    for start in range(0, vocabulary, _CHUNK_ROWS):
        rows = table[start : min(start + _CHUNK_ROWS, vocabulary)].detach().cpu().float()
        cosines = units.cpu() @ torch.nn.functional.normalize(rows, dim=1).T  # [R, chunk]
        numbers = torch.arange(start, start + rows.shape[0]).expand_as(cosines)
        best, ids = torch.cat([best, cosines], dim=1), torch.cat([ids, numbers], dim=1)
        best, places = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, places)
    return tuple(
        tuple(
            NearToken(token_id, _shown(tokenizer, token_id), cosine)
            for token_id, cosine in zip(row_ids, row_cosines, strict=True)
        )
        for row_ids, row_cosines in zip(ids.tolist(), best.tolist(), strict=True)
    )


def _shown(tokenizer: Vocabulary, token_id: int) -> str:
    text = str(tokenizer.decode([token_id]))
    # A byte-level token can be part of a character, which decodes to the replacement sign.
    return str(tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in text or not text else text
