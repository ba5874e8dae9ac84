"""Which parameters of a test `make test` runs, and which `make test-all` alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def only(quick: Collection[Any], among: Iterable[Any]) -> list[Any]:
    """Return parameters, those that are not among the quick ones marked slow; tuples are several parameters."""
    return [each if each in quick else pytest.param(*_several(each), marks=pytest.mark.slow) for each in among]


def _several(each: Any) -> tuple[Any, ...]:
    return each if isinstance(each, tuple) else (each,)
