"""Ten seconds of the load that `bench/serving_load.py` fires: every answer as alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
ROOT = Path(__file__).parents[2]


def test_every_answer_under_load_is_the_answer_alone():
    script = ROOT / "bench" / "serving_load.py"
    command = [sys.executable, str(script), "--seconds", "10", "--prompts", "4", "--each", "4"]
    done = subprocess.run(
        [*command, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout)
    for what in ("whole", "streamed", "refused", "gone in the middle"):
        assert counts[what] > 0, counts


def test_the_comparison_sees_what_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from serving_cases import Case
    from serving_load import WrongAnswerError, check

    case = Case("/v1/completions", {"model": "m"}, ("good",), (-1.0, -2.0))

    def reply(text, *logprobs):
        return {"choices": [{"text": text, "logprobs": {"token_logprobs": list(logprobs)}}]}

    check(case, 200, reply("good", -1.00005, -2.0))
    for status, wrong in (
        (200, reply("bad", -1.0, -2.0)),
        (200, reply("good", -1.0002, -2.0)),
        (500, reply("good", -1.0, -2.0)),
    ):
        with pytest.raises(WrongAnswerError):
            check(case, status, wrong)
    refused = Case("/v1/completions", {}, status=(404,))
    check(refused, 404, {"error": {"message": "there is none"}})
    with pytest.raises(WrongAnswerError, match="without a message"):
        check(refused, 404, {})
    scored = Case("/v1/classify", {}, scores=(("a", -1.0),))
    with pytest.raises(WrongAnswerError, match="differ"):
        check(scored, 200, {"data": [{"scores": {"a": -1.5}}]})
