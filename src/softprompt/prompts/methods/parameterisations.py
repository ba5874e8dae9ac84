"""Parameterisations of prompt tuning: modules whose ``embeddings`` are E ``[S·P, H]``.

- low rank: E = A B, A ``[S·P, r]``, B ``[r, H]`` (Xiao et al. 2023, arXiv:2310.10094)
- ULPT: E = Z R ∘ s + b, Z ``[S·P, r]`` trained, R ``[r, H]`` fixed and random (Wu et al. 2025, arXiv:2502.04501)
- residual: E = P + MLP(P), P ``[S·P, H]`` (Razdaibiedina et al. 2023, arXiv:2305.03937)
- SuperPos: E = W T, W ``[S·P, m]`` trained, T ``[m, H]`` fixed, sampled from the vocabulary (Sadraei Javaheri et
  al. 2024, arXiv:2406.05279)

Each starts at or near given embeddings, so that every initialisation of a prompt keeps its meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from softprompt.errors import ConfigError
from softprompt.prompts import Parameterization, drawing_from, drawn_seed

BOTTLENECK = 400
"""Width inside the residual network. On T5-Large it gives the 925K parameters that Xiao et al. 2023 count
for residual prompt tuning (100 tokens, one network shared by all)."""

MIXED = 128
"""Embeddings that SuperPos mixes by default: beyond it Sadraei Javaheri et al. 2024 gained nothing more."""


class Parameterised(nn.Module, ABC):
    """Parameters that a prompt's embeddings are a function of."""

    @abstractmethod
    def embeddings(self) -> Tensor:
        """Return the embeddings ``[S·P, H]`` in float32, with gradients."""


@final
class LowRank(Parameterised):
    """A ``[S·P, r]`` times B ``[r, H]``: decomposed prompt tuning (Xiao et al. 2023, arXiv:2310.10094).

    Starts at the best approximation of rank r of the given embeddings. The paper draws both factors instead.
    """

    def __init__(self, first: Tensor, rank: int) -> None:
        """Factor the first values ``[S·P, H]``; raises ConfigError if the rank is no restriction."""
        super().__init__()
        _check_rank(rank, min(first.shape), first)
        # In double: the last bits of LAPACK's answers depend on where tensors lie in memory.
        left, sizes, right = torch.linalg.svd(first.double(), full_matrices=False)
        scale = sizes[:rank].sqrt()
        self.a = nn.Parameter((left[:, :rank] * scale).float())
        self.b = nn.Parameter((scale[:, None] * right[:rank]).float())

    def embeddings(self) -> Tensor:
        """Return A B; see ``Parameterised``."""
        return self.a @ self.b


@final
class FixedBasis(Parameterised):
    """Z ``[S·P, r]`` times a fixed random R ``[r, H]``, times s ``[H]`` plus b ``[H]``: ULPT.

    After Wu et al. 2025 (arXiv:2502.04501v1): P r + 2 H parameters. R is N(0, 1/r), drawn from ``seed``
    and kept as a buffer. Z starts at the least-squares fit of the given embeddings, which a small r can only
    meet roughly; s starts at 1, b at 0.
    """

    basis: Tensor

    def __init__(self, first: Tensor, rank: int, seed: int) -> None:
        """Draw the basis and fit the first values ``[S·P, H]``; see ``LowRank``."""
        super().__init__()
        width = first.shape[1]
        _check_rank(rank, width, first)
        self.seed = seed
        drawn = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("basis", drawn / rank**0.5)
        fit = torch.linalg.lstsq(self.basis.T.double(), first.T.double()).solution.T
        self.z = nn.Parameter(fit.float().contiguous())
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def embeddings(self) -> Tensor:
        """Return Z R ∘ s + b; see ``Parameterised``."""
        return self.z @ self.basis * self.scale + self.shift


@final
class Residual(Parameterised):
    """P + MLP(P), one network for all virtual tokens (Razdaibiedina et al. 2023, arXiv:2305.03937).

    The network is down-projection, ReLU, up-projection, layer norm, as in the paper. The norm's weight
    starts at 0 here, so that the prompt starts at exactly P.
    """

    def __init__(self, first: Tensor) -> None:
        """Keep the first values ``[S·P, H]`` and draw the network."""
        super().__init__()
        width = first.shape[1]
        inner = min(BOTTLENECK, width)
        self.prompt = nn.Parameter(first.clone())
        norm = nn.LayerNorm(width)
        nn.init.zeros_(norm.weight)
        self.network = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width), norm)

    def embeddings(self) -> Tensor:
        """Return P + MLP(P); see ``Parameterised``."""
        added: Tensor = self.network(self.prompt)
        return self.prompt + added


@final
class Superposition(Parameterised):
    """W ``[S·P, m]`` times fixed embeddings T ``[m, H]``: SuperPos (Sadraei Javaheri et al. 2024).

    Every virtual token is a mixture of the same m embeddings, with any weights (no softmax). T is the first values,
    so that the prompt starts at exactly these, and for the rest embeddings drawn from the vocabulary; with first
    values from the vocabulary (TEXT, SAMPLE_VOCAB) all of T is. The weights are in units in which a step of theirs
    moves an embedding by as much as a step of the embedding itself, so that a learning rate means the same.
    """

    basis: Tensor

    def __init__(self, first: Tensor, mixed: int, sampled: Callable[[int], Tensor]) -> None:
        """Draw what is mixed; ``sampled`` returns embeddings ``[N, H]`` of N tokens.

        Raises:
            ConfigError: ``mixed`` (m) embeddings do not hold the first values.
        """
        super().__init__()
        count = len(first)
        if mixed < count:
            raise ConfigError(
                f"parameterization_rank {mixed} of superpos is the number of embeddings that are mixed, and the "
                f"{count} that the prompt starts at are among them; use at least {count}"
            )
        mixture = torch.cat([first, sampled(mixed - count)])
        unit = float(mixture.square().mean().sqrt()) * mixed**0.5
        self.register_buffer("basis", mixture / unit)
        self.weights = nn.Parameter(torch.eye(count, mixed) * unit)

    def embeddings(self) -> Tensor:
        """Return W T; see ``Parameterised``."""
        return self.weights @ self.basis


def parameterised(
    kind: Parameterization,
    first: Tensor,
    rank: int,
    generator: torch.Generator | None,
    sampled: Callable[[int], Tensor],
) -> Parameterised | None:
    """Return parameters for first values ``[S·P, H]``; None for the embeddings themselves.

    ``sampled`` draws the embeddings ``[N, H]`` of N tokens; see ``LowRank`` for the rest.
    """
    match kind:
        case Parameterization.LOW_RANK:
            return LowRank(first, rank)
        case Parameterization.ULPT:
            return FixedBasis(first, rank, drawn_seed(generator))
        case Parameterization.RESIDUAL:
            with drawing_from(generator):
                return Residual(first)
        case Parameterization.SUPERPOS:
            return Superposition(first, rank or MIXED, sampled)
    return None


def _check_rank(rank: int, most: int, first: Tensor) -> None:
    if rank > most:
        raise ConfigError(
            f"parameterization_rank {rank} restricts nothing for a prompt {list(first.shape)}; use at most "
            f"{most}, or parameterization direct"
        )
