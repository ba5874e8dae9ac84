"""Bases of the same weights, probed once in a process: probes are most of what a command on a small base costs."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any

import pytest

from softprompt.backbone import Fingerprint, load
from softprompt.backbone.state import state_of

_found: dict[str, dict[str, Any]] = {}
"""What probes found, by class, fingerprint and dtype."""


def sharing(model):
    """Return a model that was not run yet, with what was found of those of the same weights before it."""
    key = json.dumps([type(model).__name__, Fingerprint.of(model).to_dict(), str(model.dtype)], default=str)
    state_of(model).found = _found.setdefault(key, {})
    return model


@contextmanager
def probed_once():
    """Let the bases that are loaded inside share what was found of others; not those in memory, made for a test."""
    read = load._read

    def shared(source, seq2seq, dtype, shard, options, *, runs):
        model = read(source, seq2seq, dtype, shard, options, runs=runs)
        return sharing(model) if runs and shard is None else model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "_read", shared)
        yield
