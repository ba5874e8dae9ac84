"""The bundled model, probed once in a process: its probes are most of what a command on it costs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest

from softprompt.backbone import load
from softprompt.backbone.state import state_of
from softprompt.bundled import DEMO

_found: dict[str, dict[str, Any]] = {}
"""What probes found, by dtype."""


@contextmanager
def probed_once():
    """Let each bundled model that is loaded inside share what was found of the others."""
    made = load._sharded

    def known(base, place):
        if base.name == DEMO:
            state_of(base.model).found = _found.setdefault(str(base.dtype), {})
        return made(base, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_sharded", known)
        yield
