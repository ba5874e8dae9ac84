"""New prompts from old ones, and how alike two are: pure functions of embeddings ``[P, H]``.

Composing keeps leading dimensions.

Whether adding, averaging or joining trained prompts does anything sensible depends on the prompts:
those of one initial prompt lie near each other, others need not. Measure the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softprompt.errors import ConfigError, nearest
from softprompt.prompts.kinds import MEASURES, Measure

_HELD_OUT = 10
"""Every tenth shared token measures the map of ``recycle`` and is not used to fit it."""


@dataclass(frozen=True, slots=True)
class Recycled:
    """A prompt mapped to another base.

    Attributes:
        embeddings: The mapped prompt ``[P, H_b]``, float32.
        error: ``|| E_a W - E_b || / || E_b ||`` over tokens that the map was not fitted on; 0 is
            exact, 1 is no better than zeros.
        tokens: Shared tokens that the map was fitted on.
    """

    embeddings: Tensor
    error: float
    tokens: int


def average(prompts: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the weighted mean of prompts of one length; weights count relative to their sum.

    Args:
        prompts: Embeddings ``[P, H]`` each.
        weights: One number of 0 or more for each prompt; None weighs all the same.

    Raises:
        ConfigError: If lengths or widths differ, or the weights cannot be used.
    """
    _same_width(prompts)
    lengths = [prompt.shape[-2] for prompt in prompts]
    if len(set(lengths)) > 1:
        raise ConfigError(
            f"an average needs prompts of one length, got {', '.join(map(str, lengths))} virtual "
            "tokens; token i of one has nothing to do with token i of another length: resize them first"
        )
    shares = _shares([1.0] * len(prompts) if weights is None else weights, len(prompts))
    parts = [share * prompt for share, prompt in zip(shares, prompts, strict=True)]
    return torch.stack(parts).sum(dim=0)


def concatenation(prompts: Sequence[Tensor]) -> Tensor:
    """Return the virtual tokens of all prompts one after the other, ``[P_1 + P_2 + ..., H]``.

    Raises:
        ConfigError: If widths differ.
    """
    _same_width(prompts)
    return torch.cat(list(prompts), dim=-2)


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Return ``first - second`` ``[P, H]``: what training added, when both started at the same values.

    Raises:
        ConfigError: If the shapes differ.
    """
    _same_shape(first, second, "a difference")
    return first - second


def shifted(prompt: Tensor, change: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``prompt + scale * change``: a difference carried over to another prompt.

    Task arithmetic (Ilharco et al. 2023) on prompts, as Belanec et al. 2024 do it.

    Raises:
        ConfigError: If the shapes differ, or the scale is not finite.
    """
    _same_shape(prompt, change, "adding a difference")
    if not math.isfinite(scale):
        raise ConfigError(f"scale expects a finite number, got {scale}")
    return prompt + scale * change


def resized(prompt: Tensor, length: int) -> Tensor:
    """Return a prompt of another length: its first virtual tokens, or all of them over again.

    Repeated tokens were trained; interpolated ones would lie between two that were.
    Text is made to fit in the same way (``initialisers.fitted``).

    Raises:
        ConfigError: If the length is less than 1.
    """
    if length < 1:
        raise ConfigError(f"a prompt has at least 1 virtual token, got {length}")
    order = torch.arange(length, device=prompt.device) % prompt.shape[-2]
    return prompt.index_select(-2, order)


@torch.no_grad()
def recycle(prompt: Tensor, table_a: Tensor, table_b: Tensor) -> Recycled:
    """Map a prompt from base a to base b; an approximation, tune it further.

    W ``[H_a, H_b]`` minimises ``|| E_a W - E_b ||`` over the embeddings of the tokens that both bases share, and
    maps the prompt too (Lester et al. 2022, 2208.05577, the linear map from vocabulary to vocabulary).

    Args:
        prompt: Embeddings ``[P, H_a]``.
        table_a: Embeddings of N shared tokens in base a ``[N, H_a]``.
        table_b: The same tokens, in the same order, in base b ``[N, H_b]``.

    Raises:
        ConfigError: If the tables do not fit, or there are too few tokens to determine the map.
    """
    if table_a.shape[0] != table_b.shape[0] or table_a.shape[1] != prompt.shape[-1]:
        raise ConfigError(
            f"recycling needs tables of the same tokens, the first {prompt.shape[-1]} wide, got "
            f"{list(table_a.shape)} and {list(table_b.shape)}"
        )
    held_out = torch.arange(table_a.shape[0]) % _HELD_OUT == 0
    fitted = int((~held_out).sum())
    if fitted < table_a.shape[1]:
        raise ConfigError(
            f"recycling needs {table_a.shape[1]} shared tokens to fit on, and {fitted} are left of the "
            f"{table_a.shape[0]} that the two bases share, too few; start from RANDOM or TEXT instead"
        )
    inputs, targets = table_a.cpu().double(), table_b.cpu().double()
    # By SVD, for tables of less than full rank: the default driver (gelsy) starts from a pivot
    # array that torch leaves uninitialised, and now and then finds too low a rank.
    linear = torch.linalg.lstsq(inputs[~held_out], targets[~held_out], driver="gelsd").solution
    missed = inputs[held_out] @ linear - targets[held_out]
    error = float(missed.norm() / targets[held_out].norm())
    mapped = prompt.cpu().double() @ linear
    return Recycled(mapped.float(), error, fitted)


def similarity(first: Tensor, second: Tensor, measure: Measure = "mean") -> float:
    """Return how alike two prompts are, a cosine between -1 and 1 (Vu et al. 2022, SPoT, compare tasks by it).

    It does not depend on the order of the two, or of virtual tokens.

    Args:
        first: Embeddings ``[P_1, H]``.
        second: Embeddings ``[P_2, H]``, of any length.
        measure: ``mean`` compares the mean embeddings; ``pairs`` is the mean cosine over all pairs of a
            virtual token of the one and one of the other. Both are 0 for a prompt of zeros.

    Raises:
        ConfigError: If the widths differ, or there is no such measure.
    """
    if measure not in MEASURES:
        raise ConfigError(f"measure is one of {', '.join(MEASURES)}, got {measure!r}{nearest(measure, MEASURES)}")
    if first.shape[-1] != second.shape[-1]:
        raise ConfigError(
            f"only prompts of one base can be compared, got embeddings {first.shape[-1]} and "
            f"{second.shape[-1]} wide"
        )
    a, b = first.double(), second.double()
    if measure == "mean":
        return float(normalize(a.mean(dim=0), dim=0) @ normalize(b.mean(dim=0), dim=0))
    # The mean over all pairs of unit vectors is the product of the means of the unit vectors.
    return float(normalize(a, dim=1).mean(dim=0) @ normalize(b, dim=1).mean(dim=0))


def _shares(weights: Sequence[float], count: int) -> list[float]:
    numbers = [float(weight) for weight in weights]
    if len(numbers) != count:
        raise ConfigError(f"an average of {count} prompts needs {count} weights, got {len(numbers)}")
    total = sum(numbers)
    if not all(math.isfinite(each) and each >= 0 for each in numbers) or total <= 0:
        raise ConfigError(
            f"weights are numbers of 0 or more, not all 0, got {', '.join(map(str, numbers))}; "
            "use a difference to subtract"
        )
    return [each / total for each in numbers]


def _same_width(prompts: Sequence[Tensor]) -> None:
    if not prompts:
        raise ConfigError("expected at least one prompt, got none")
    widths = [prompt.shape[-1] for prompt in prompts]
    if len(set(widths)) > 1:
        raise ConfigError(
            f"the prompts are {', '.join(map(str, widths))} wide; only prompts of one base can be composed"
        )


def _same_shape(first: Tensor, second: Tensor, what: str) -> None:
    if first.shape != second.shape:
        raise ConfigError(
            f"{what} needs prompts of one shape, got {list(first.shape)} and {list(second.shape)}; "
            "resize one of them first"
        )
