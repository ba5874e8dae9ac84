"""Every answer under load is the answer to the request alone: the correctness test of serving.

Starts `softprompt serve` on the bundled model with prompts of several kinds, and fires requests
from many clients for a while: shuffled, streamed and whole, good and bad ones mixed, some clients
gone in the middle. Texts must be those of a request alone (greedy ones by a whole pass of the
model for each token, the others by `TunedPrompt.generate`), log-probabilities and label scores to
1e-4; bad requests must be refused alone; nothing may run on afterwards.

    python bench/serving_load.py [--seconds 120] [--clients 16] [--prompts 8] [--json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from serving_cases import Case, bad_cases, good_cases, prompts_in
from softprompt.backbone.load import load_base

CLOSE = 1e-4
START = "from softprompt.cli.main import main; main()"


class WrongAnswerError(Exception):
    """An answer under load was not the one the request gets alone."""


@contextlib.contextmanager
def served(prompts: Path) -> Iterator[str]:
    """Run a server; yield its address; it must end well when told to."""
    command = [sys.executable, "-c", START, "serve", "--base-model", "demo"]
    command += ["--prompts", str(prompts)]
    # A cache smaller than the prompts, so that they come and go.
    command += ["--port", "0", "--max-prompts-resident", "5", "--max-batch-rows", "12"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"http://\S+", line):
                    yield found[0]
                    break
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
        if process.returncode not in (0, -signal.SIGTERM):
            raise WrongAnswerError(f"the server ended with {process.returncode}: {said[-2000:]}")


def check(case: Case, status: int, reply: Mapping[str, Any]) -> None:
    """Compare a whole reply with what must come.

    Raises:
        WrongAnswerError: It is another.
    """
    if status not in case.status:
        raise WrongAnswerError(f"{case.body} came back with {status}: {reply}")
    if status != 200:
        if not isinstance(reply.get("error", {}).get("message"), str):
            raise WrongAnswerError(f"{case.body} was refused without a message: {reply}")
        return
    if case.scores:
        found = reply["data"][0]["scores"]
        near(case, [found[label] for label, _ in case.scores], [s for _, s in case.scores])
        return
    texts = tuple(choice["text"] for choice in reply["choices"])
    if texts != case.answers:
        raise WrongAnswerError(f"{case.body} gave {texts}, alone it gives {case.answers}")
    if case.logprobs:
        near(case, reply["choices"][0]["logprobs"]["token_logprobs"], case.logprobs)


def near(case: Case, found: Sequence[float], expected: Sequence[float]) -> None:
    """Compare log-probabilities."""
    apart = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    if max(apart) > CLOSE:
        raise WrongAnswerError(f"{case.body}: log-probabilities differ by {max(apart)}")


async def whole(client: httpx.AsyncClient, case: Case) -> None:
    """Ask for a whole reply."""
    if isinstance(case.body, str):
        reply = await client.post(
            case.path, content=case.body, headers={"Content-Type": "application/json"}
        )
    else:
        reply = await client.post(case.path, json=case.body)
    check(case, reply.status_code, reply.json())


async def streamed(client: httpx.AsyncClient, case: Case, pieces: int | None = None) -> None:
    """Ask for a stream and put it together; or hang up after some pieces."""
    assert isinstance(case.body, Mapping)
    text, logprobs, count = "", [], 0
    async with client.stream("POST", case.path, json={**case.body, "stream": True}) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise WrongAnswerError(f"{case.body} broke off: {event}")
            for choice in event["choices"]:
                text += choice["text"]
                logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
            count += 1
            if pieces is not None and count >= pieces:
                return
    choice = {"text": text, "logprobs": {"token_logprobs": logprobs}}
    check(case, reply.status_code, {"choices": [choice]})


async def client_for(
    address: str, good: Sequence[Case], bad: Sequence[Case], seed: int, end: float
) -> Counter[str]:
    """Ask one thing after the other until the end."""
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        while time.monotonic() < end:
            case = rng.choice(bad) if rng.random() < 0.15 else rng.choice(good)
            streams = case.path == "/v1/completions" and case.status == (200,)
            if streams and rng.random() < 0.15:
                await streamed(client, case, pieces=rng.randint(1, 4))
                done["gone in the middle"] += 1
            elif streams and rng.random() < 0.5:
                await streamed(client, case)
                done["streamed"] += 1
            else:
                await whole(client, case)
                done["whole" if case.status == (200,) else "refused"] += 1
    return done


async def idle(address: str) -> None:
    """Wait until nothing runs.

    Raises:
        WrongAnswerError: Something is stuck.
    """
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        for _ in range(100):
            lines = (await client.get("/metrics")).text.splitlines()
            states = [line for line in lines if re.match(r"softprompt_num_requests_\w+ ", line)]
            if states and all(float(line.split()[-1]) == 0 for line in states):
                return
            await asyncio.sleep(0.1)
    raise WrongAnswerError(f"something still runs: {states}")


async def fire(
    address: str, good: Sequence[Case], bad: Sequence[Case], clients: int, seconds: float
) -> Counter[str]:
    """Ask each thing once, all at once; then as clients do, for some time."""
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        await asyncio.gather(*(whole(client, case) for case in [*good, *bad]))
    done = Counter({"all at once": len(good) + len(bad)})
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client_for(address, good, bad, seed, end)) for seed in range(clients)
        ]
    for task in tasks:
        done += task.result()
    await idle(address)
    return done


def main() -> None:
    """Fire, compare, and print what was done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="how long to fire")
    parser.add_argument("--clients", type=int, default=16, help="clients at once")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the server")
    parser.add_argument("--each", type=int, default=8, help="requests to know of each prompt")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base("demo")
    base.model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        prompts = prompts_in(Path(folder), base, options.prompts, virtual=50)
        good, bad = good_cases(prompts, base, options.each), bad_cases("prompt-0", base.name)
        with served(Path(folder)) as address:
            start = time.monotonic()
            done = asyncio.run(fire(address, good, bad, options.clients, options.seconds))
            took = time.monotonic() - start
    result = {"cases": len(good) + len(bad), "seconds": took, **done}
    if options.json:
        print(json.dumps(result))
    else:
        said = ", ".join(f"{count} {what}" for what, count in done.items())
        print(f"{result['cases']} cases, {took:.0f} s: {said}; every answer as alone")


if __name__ == "__main__":
    main()
