"""Ten seconds of the load and the faults of `bench/serving_load.py`: every answer as alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
ROOT = Path(__file__).parents[2]


FIRED = (
    "whole request: right",
    "streamed request: right",
    "request for a changing prompt: right",
    "bad request: 400",
    "client gone in a stream: -",
    "client gone while waiting: -",
    "request in a crowd: 429",
    "prompt overwritten: right",
    "prompt truncated: 500",
    "prompt deleted: 404",
    "prompt put back: right",
    "10 MB body: 413",
    "half a body, then silence: 408",
    "stream left unread: hung up on",
    "server killed and started again: -",
    "after the load: right",
)


@pytest.mark.slow
def test_every_answer_under_load_is_the_answer_alone():
    script = ROOT / "bench" / "serving_load.py"
    size = ["--seconds", "10", "--prompts", "4", "--each", "4", "--clients", "6"]
    done = subprocess.run(
        [sys.executable, str(script), *size, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert [what for what in FIRED if not found["fired"].get(what)] == []


def test_the_comparison_sees_what_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from serving_asking import check
    from serving_cases import Case
    from serving_process import WrongAnswerError

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
    check(refused, 404, {"error": {"message": "there is none", "code": "model_not_found"}})
    with pytest.raises(WrongAnswerError, match="without a message"):
        check(refused, 404, {})
    with pytest.raises(WrongAnswerError, match="another reason"):
        check(refused, 404, {"error": {"message": "there is none", "code": "wrong_host"}})
    versions = Case("/v1/completions", {}, ("old",), others=(Case("", {}, ("new",)),))
    for text in ("old", "new"):
        check(versions, 200, reply(text))
    with pytest.raises(WrongAnswerError, match=r"alone it gives.*alone it gives"):
        check(versions, 200, reply("nold"))
    scored = Case("/v1/classify", {}, scores=(("a", -1.0),))
    with pytest.raises(WrongAnswerError, match="differ"):
        check(scored, 200, {"data": [{"scores": {"a": -1.5}}]})
