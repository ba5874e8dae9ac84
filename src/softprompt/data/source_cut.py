"""Shortening the values of a record, longest first, until the rendered text fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def cut_values(
    fields: Mapping[str, str], names: tuple[str, ...], fits: Callable[[Mapping[str, str]], bool]
) -> dict[str, str]:
    """Return ``fields`` with the values of ``names`` cut from the right until ``fits`` holds.

    All values longer than a common number of characters are cut to it, the largest number that
    fits, so the longest value loses first and short ones stay whole. Empty values must fit.
    """
    low, high = 0, max((len(fields[name]) for name in names), default=0)
    best = _cut_to(fields, names, low)
    while high - low > 1:
        middle = (low + high) // 2
        candidate = _cut_to(fields, names, middle)
        if fits(candidate):
            low, best = middle, candidate
        else:
            high = middle
    return best


def _cut_to(fields: Mapping[str, str], names: tuple[str, ...], characters: int) -> dict[str, str]:
    cut = dict(fields)
    for name in names:
        if len(cut[name]) > characters:
            # A space left hanging at the cut would become a token of its own.
            cut[name] = cut[name][:characters].rstrip()
    return cut
