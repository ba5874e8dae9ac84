"""First values of a prompt, as pure functions that return rows ``[P, H]`` in float32.

``embed`` maps token ids ``[N]`` to rows ``[N, H]`` and is the base's own embedding module,
so that a scale inside it (Gemma, BART) is part of the rows, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softprompt.errors import ConfigError

Embed = Callable[[Tensor], Tensor]

_RMS_SAMPLE = 4096
"""Rows looked at for the rms: enough for three digits, cheap for vocabularies of 256k."""


def normal(length: int, width: int, *, std: float, generator: torch.Generator | None) -> Tensor:
    """Draw rows ``[P, H]`` from N(0, std²)."""
    return torch.randn(length, width, generator=generator) * std


def from_tokens(length: int, ids: Sequence[int], embed: Embed) -> Tensor:
    """Embed ids, tiled when there are fewer than ``length`` and cut from the right when more.

    Raises:
        ConfigError: If there is no id at all.
    """
    if not ids:
        raise ConfigError("prompt_tuning_init_text has no tokens; give a text with at least one")
    tiled = [ids[i % len(ids)] for i in range(length)]
    return _embed(tiled, embed)


def sampled(
    length: int, vocabulary: int, embed: Embed, *, generator: torch.Generator | None
) -> Tensor:
    """Embed ``length`` ids drawn uniformly from the vocabulary."""
    return _embed(torch.randint(0, vocabulary, (length,), generator=generator).tolist(), embed)


def from_labels(
    length: int,
    labels: Sequence[Sequence[int]],
    vocabulary: int,
    embed: Embed,
    *,
    generator: torch.Generator | None,
) -> Tensor:
    """Start the first rows at the labels and the rest at sampled vocabulary.

    A label of several sub-tokens is the mean of their embeddings (Lester et al. 2021, 3.2).

    Raises:
        ConfigError: If there are more labels than rows, or an empty label.
    """
    if len(labels) > length:
        raise ConfigError(
            f"LABELS needs a row for each of the {len(labels)} labels, num_virtual_tokens is {length}; "
            "raise it, or use TEXT"
        )
    if not all(labels):
        raise ConfigError("LABELS found a label without tokens; remove the empty line")
    rows = [_embed(ids, embed).mean(dim=0, keepdim=True) for ids in labels]
    rest = sampled(length - len(labels), vocabulary, embed, generator=generator)
    return torch.cat([*rows, rest])


@torch.no_grad()
def rms(embed: Embed, vocabulary: int) -> float:
    """Return the root mean square of an embedding, over evenly spaced ids of the vocabulary."""
    step = max(1, vocabulary // _RMS_SAMPLE)
    return float(embed(torch.arange(0, vocabulary, step)).float().square().mean().sqrt())


def _embed(ids: Sequence[int], embed: Embed) -> Tensor:
    with torch.no_grad():
        return embed(torch.tensor(ids, dtype=torch.long)).detach().to("cpu", torch.float32).clone()
