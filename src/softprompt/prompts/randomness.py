"""Letting torch's own initialisers draw from a given generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def drawn_seed(generator: torch.Generator | None) -> int:
    """Return a seed drawn from a generator; None is torch's global one."""
    return int(torch.randint(2**31 - 1, (), generator=generator))


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Make layers that are built inside the context depend on ``generator`` alone; None changes nothing."""
    if generator is None:
        yield
        return
    seed = drawn_seed(generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
