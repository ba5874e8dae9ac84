"""How alike two prompts of one base are; Vu et al. 2022 (SPoT) compare tasks by it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from softprompt.errors import ConfigError, nearest
from softprompt.prompts.kinds import MEASURES, Measure

__all__ = ["MEASURES", "Measure", "similarity"]


def similarity(first: Tensor, second: Tensor, measure: Measure = "mean") -> float:
    """Return a cosine between -1 and 1 that does not depend on the order of the two, or of virtual tokens.

    Args:
        first: Embeddings ``[P_1, H]``.
        second: Embeddings ``[P_2, H]``, of any length.
        measure: ``mean`` compares the mean embeddings; ``pairs`` is the mean cosine over all pairs of a
            virtual token of the one and one of the other. Both are 0 for a prompt of zeros.

    Raises:
        ConfigError: If the widths differ, or there is no such measure.
    """
    if measure not in MEASURES:
        raise ConfigError(
            f"measure is one of {', '.join(MEASURES)}, got {measure!r}{nearest(measure, MEASURES)}"
        )
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
