"""A scorer that stops fails what waits, and is not held up by callers that have gone."""

from __future__ import annotations

import pytest

from oracles.served import served
from softprompt.errors import NotServingError
from softprompt.inference.continuous.scorer import Scorer


def test_a_caller_that_has_gone_does_not_hold_up_the_end():
    base = served("llama", kinds=("plain",))
    scorer = Scorer(base.model, max_rows=4, max_waiting=4)
    gone, waiting = (scorer.submit(base.values["plain"], ()) for _ in range(2))
    assert gone.cancel()
    scorer.stop()
    assert gone.cancelled()
    with pytest.raises(NotServingError):
        waiting.result(1)
