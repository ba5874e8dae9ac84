"""Every answer under load is the answer to the request alone: the correctness test of serving.

Starts `softprompt serve` on the bundled model with prompts of several kinds, and fires requests
from many clients for a while: shuffled, streamed and whole, good and bad ones mixed, some clients
gone in the middle. Meanwhile prompts are replaced, damaged and deleted, the queue is filled,
readers and senders stall, and the process is killed and started again. Texts must be those of a
request alone (greedy ones by a whole pass of the model for each token, the others by
`TunedPrompt.generate`), log-probabilities and label scores to 1e-4; bad requests must be refused
alone; nothing may run on afterwards, and the server's numbers must be those that clients counted.

    python bench/serving_load.py [--seconds 120] [--clients 16] [--prompts 8] [--json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alone import alone
from serving_asking import Load, ask, leave_early, leave_stream
from serving_cases import (
    Case,
    bad_cases,
    changing_cases,
    crowd_case,
    good_cases,
    loaded,
    prompts_in,
    write_prompt,
)
from serving_faults import Changing, copied, cycles
from serving_process import ServerProcess, WrongAnswerError
from softprompt.backbone import Base, load_base

VIRTUAL = 50


@dataclass(frozen=True)
class Work:
    """What is fired.

    Attributes:
        good: Requests that must be answered.
        bad: Requests that must be refused.
        changing: Prompts whose files change, with requests for them.
        crowd: A request that fills the queue.
    """

    good: Sequence[Case]
    bad: Sequence[Case]
    changing: Sequence[Changing]
    crowd: Case

    @property
    def unsteady(self) -> list[Case]:
        """Requests for prompts that change."""
        return [case for each in self.changing for case in each.cases]


def prepared(root: Path, versions: Path, base: Base, count: int, each: int) -> Work:
    """Write the prompts, and find out what they answer alone."""
    prompts = prompts_in(root, base, count, VIRTUAL)
    changing = []
    versions.mkdir()
    for number, prefix in enumerate((False, True)):
        name = "changing-kv" if prefix else "changing"
        folders = [versions / f"{name}-{version}" for version in "ab"]
        for seed, folder in enumerate(folders, start=100 * (number + 1)):
            write_prompt(folder, base, VIRTUAL - seed % 2, seed=seed, prefix=prefix)
        cases = changing_cases(name, [loaded(folder, base) for folder in folders], each)
        changing.append(Changing(root / name, folders, cases))
        copied(root / name, folders[0])
    crowd = crowd_case("prompt-0", prompts["prompt-0"], 8)
    good = good_cases(prompts, base, each)
    return Work(good, bad_cases("prompt-0", base.name), changing, crowd)


async def client_for(load: Load, work: Work, seed: int, end: asyncio.Event) -> None:
    """Ask one thing after the other until the end."""
    rng = random.Random(seed)
    unsteady, streaming = work.unsteady, [case for case in work.good if case.streams]
    async with load.client() as client:
        while not end.is_set():
            case, kind = rng.choice(work.good), rng.random()
            if kind < 0.1:
                await ask(load, client, rng.choice(work.bad), "bad request")
            elif kind < 0.25:
                case = rng.choice(unsteady)
                stream = case.streams and rng.random() < 0.5
                await ask(load, client, case, "request for a changing prompt", stream=stream)
            elif kind < 0.35:
                await leave_stream(load, client, rng.choice(streaming), rng.randint(1, 4))
            elif kind < 0.4:
                await leave_early(load, client, rng.choice(streaming), rng.uniform(0.005, 0.2))
            elif case.streams and rng.random() < 0.5:
                await ask(load, client, case, "streamed request", stream=True)
            else:
                await ask(load, client, case, "whole request")


async def all_at_once(load: Load, work: Work) -> None:
    """Ask each thing once, whole, streamed and given up, all at the same time."""
    good = [case for case in work.good if case.streams]
    async with load.client() as client, asyncio.TaskGroup() as group:
        for case in [*work.good, *work.bad, *work.unsteady]:
            group.create_task(ask(load, client, case, "all kinds at once"))
        for case in good[::3]:
            group.create_task(ask(load, client, case, "streamed request", stream=True))
        for number, case in enumerate(good[::7]):
            group.create_task(leave_stream(load, client, case, number % 4 + 1))
            group.create_task(leave_early(load, client, case, 0.05))


async def idle(server: ServerProcess) -> dict[str, float]:
    """Wait until nothing runs, and return the server's numbers.

    Raises:
        WrongAnswerError: Something is stuck.
    """
    for _ in range(100):
        numbers = await asyncio.to_thread(server.metrics)
        states = {k: v for k, v in numbers.items() if k.startswith("softprompt_num_requests_")}
        if len(states) == 2 and not any(states.values()):
            return numbers
        await asyncio.sleep(0.1)
    raise WrongAnswerError(f"something still runs: {states}")


async def closed(load: Load) -> int:
    """Wait until the connections of clients that are gone are closed; return the files still open.

    Raises:
        WrongAnswerError: They stay.
    """
    for _ in range(200):
        files = load.server.open_files()
        if files <= load.files + 3:
            return files
        await asyncio.sleep(0.1)
    raise WrongAnswerError(f"{files} files are open, {load.files} were")


def check_numbers(load: Load, numbers: dict[str, float]) -> None:
    """Compare what the server counted in its last life with what its clients saw.

    Raises:
        WrongAnswerError: They differ by more than what clients did not wait for.
    """
    ended: Counter[str] = Counter()
    for name, value in numbers.items():
        if found := re.match(r'softprompt_request_success_total\{finished_reason="(\w+)"', name):
            ended["aborts" if found[1] == "abort" else "answers"] += int(value)
    answers, left = load.seen["answers"], load.left.total()
    if not answers <= ended["answers"] <= answers + left:
        raise WrongAnswerError(f"{answers} answers came, {left} were left, but it counts {ended}")
    if not load.left["begun"] <= ended.total() - answers <= left:
        raise WrongAnswerError(f"{answers} answers came, {load.left} left, but it counts {ended}")
    for code in (400, 404, 408, 413, 429, 500, 503):
        counted = numbers.get(f'softprompt_requests_refused_total{{code="{code}"}}', 0)
        if not load.seen[code] <= counted <= load.seen[code] + load.left["not begun"]:
            raise WrongAnswerError(f"{load.seen[code]} requests came back with {code}, but it counts {counted:g}")


async def fire(load: Load, work: Work, clients: int, seconds: float) -> dict[str, Any]:
    """Fire everything for a while, and look at what is left."""
    load.up.set()
    await all_at_once(load, work)
    end = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for seed in range(clients):
            group.create_task(client_for(load, work, seed, end))
        rounds = await cycles(load, work.changing, work.crowd, seconds)
        end.set()
    check_numbers(load, await idle(load.server))
    files = await closed(load)
    async with load.client() as client:
        for case in [*work.good, *work.unsteady]:
            if await ask(load, client, case, "after the load") != 200:
                raise WrongAnswerError(f"{case.body} has no answer any more")
    return {"rounds": rounds, "open_files": files, "memory_mib": load.server.memory_mib()}


def table(fired: Counter[tuple[str, str]]) -> str:
    """Return what was fired and what came back, a line for each."""
    rows: dict[str, list[str]] = {}
    for (what, came), count in sorted(fired.items()):
        rows.setdefault(what, []).append(f"{count} {came}" if came != "-" else f"{count}")
    width = max(map(len, rows))
    return "\n".join(f"{what:<{width}}  {', '.join(came)}" for what, came in rows.items())


def main() -> None:
    """Fire, compare, and print what was done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="how long to fire, at least")
    parser.add_argument("--clients", type=int, default=16, help="clients at once")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the server")
    parser.add_argument("--each", type=int, default=8, help="requests to know of each prompt")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base("demo")
    base.model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        root, versions = Path(folder) / "prompts", Path(folder) / "versions"
        root.mkdir()
        server = ServerProcess(root, Path(folder) / "log")
        load = Load(server)
        try:
            server.start()
            work = prepared(root, versions, base, options.prompts, options.each)
            server.wait()
            start = time.monotonic()
            left = asyncio.run(fire(load, work, options.clients, options.seconds))
            took = time.monotonic() - start
            server.stop()
        finally:
            server.close()
    result = {"requests": load.fired.total(), "seconds": took, "slowest": load.slowest, **left}
    if options.json:
        fired = {f"{what}: {came}": count for (what, came), count in sorted(load.fired.items())}
        print(json.dumps(result | {"fired": fired}))
        return
    print(table(load.fired))
    said = ", ".join(f"{name} {value:.0f}" for name, value in result.items())
    print(f"\n{said}; every answer as alone")


if __name__ == "__main__":
    alone()
    main()
