"""Memory of a server that answers for a long time: mixed requests, then prompts unloaded and loaded again.

Starts `softprompt serve` on the bundled model with prompts of several kinds and a chat template, and asks
from several clients at once: completions whole and streamed, chats, label scores, vectors, requests that are
wrong, and clients that hang up. Then one prompt after the other is unloaded, refused, loaded and asked. Every
status is checked; the process's resident memory is read all the way. Its growth is the slope over the second
half, where nothing is new.

    python bench/soak.py [--requests 10000] [--cycles 1000] [--plot docs/images/soak.png] [--json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from alone import alone
from serving_cases import ASK, LABELS, bad_cases, damaged, text_of, write_prompt
from serving_process import ServerProcess, WrongAnswerError
from softprompt.backbone import load_base
from softprompt.bundled import model_directory

PROMPTS, VIRTUAL, CLIENTS, SAMPLES = 8, 50, 8, 100
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
KINDS = {"completion": 30, "streamed": 15, "chat": 10, "streamed chat": 5, "classify": 15, "embeddings": 10}
KINDS |= {"wrong": 10, "hung up": 5}
"""What is asked, in per cent."""


@dataclass
class Curve:
    """Resident memory over what was done.

    Attributes:
        what: What is counted.
        done: How many of it at each sample.
        mib: Memory at each sample, MiB.
        came: Counts of (what was asked, what came back).
        seconds: How long it took.
        files: Files and sockets that are open at the end.
    """

    what: str
    done: list[int] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    came: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    files: int = 0

    def growth(self) -> float:
        """Return MiB for a thousand more, over the second half."""
        half = len(self.done) // 2
        return float(np.polyfit(self.done[half:], self.mib[half:], 1)[0]) * 1000

    def numbers(self) -> dict[str, Any]:
        """Return what a table says of it."""
        at = {f"{share:.0%}": self.mib[round(share * (len(self.mib) - 1))] for share in (0, 0.1, 0.5, 1)}
        return {
            self.what: self.done[-1],
            "mib": at,
            "mib_per_thousand": self.growth(),
            "seconds": self.seconds,
            "files": self.files,
            "came": dict(sorted(self.came.items())),
        }


def base_with_chats(folder: Path) -> Path:
    """Write the bundled model, as links, with a chat template beside it."""
    folder.mkdir()
    for file in Path(model_directory()).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def request_of(kind: str, rng: random.Random, base: str) -> tuple[str, Any, Sequence[int]]:
    """Return where a request goes, its body, and the statuses that it may get."""
    if kind == "wrong":
        case = rng.choice(bad_cases("prompt-0", base))
        return case.path, case.body, case.status
    name, text = f"prompt-{rng.randrange(PROMPTS)}", text_of(rng, 3, 40)
    body: dict[str, Any] = {"model": name, "max_tokens": rng.randint(1, 16), "temperature": rng.choice([0, 0.8])}
    match kind.rsplit(maxsplit=1)[-1]:
        case "chat":
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}, (200,)
        case "classify":
            return "/v1/classify", {"model": name, "input": [text, text[::-1]], "labels": list(LABELS)}, (200,)
        case "embeddings":
            return "/v1/embeddings", {"model": base, "input": [text]}, (200,)
    return ASK, {**body, "prompt": text}, (200,)


async def asked(client: httpx.AsyncClient, kind: str, rng: random.Random, base: str) -> str:
    """Ask one thing; return what came back.

    Raises:
        WrongAnswerError: A status that may not be.
    """
    path, body, allowed = request_of(kind, rng, base)
    sent: dict[str, Any] = {"content": body} if isinstance(body, str) else {"json": body}
    if kind == "hung up":
        with suppress(httpx.ReadTimeout):
            early = await client.post(path, json={**body, "max_tokens": 200}, timeout=httpx.Timeout(60, read=0.05))
            if early.status_code not in allowed:
                raise WrongAnswerError(f"{kind}: {body} came back with {early.status_code}: {early.text[:500]}")
        return "left"
    if "streamed" in kind:
        sent["json"]["stream"] = True
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", path, headers=headers, **sent) as reply:
        text = (await reply.aread()).decode()
    if reply.status_code not in allowed or ("streamed" in kind and "data: [DONE]" not in text):
        raise WrongAnswerError(f"{kind}: {body} came back with {reply.status_code}: {text[:500]}")
    return str(reply.status_code)


async def answering(server: ServerProcess, count: int, base: str) -> Curve:
    """Ask mixed things from several clients."""
    curve, left, begun = Curve("requests"), iter(range(count)), time.monotonic()
    step = max(1, count // SAMPLES)
    sample(curve, server, 0)

    async def ask(seed: int) -> None:
        rng = random.Random(seed)
        async with client_of(server) as client:
            for number in left:
                (kind,) = rng.choices([*KINDS], [*KINDS.values()])
                curve.came[f"{kind}: {await asked(client, kind, rng, base)}"] += 1
                if (number + 1) % step == 0:
                    sample(curve, server, number + 1)

    async with asyncio.TaskGroup() as group:
        for seed in range(CLIENTS):
            group.create_task(ask(seed))
    sample(curve, server, count)
    curve.seconds, curve.files = time.monotonic() - begun, server.open_files()
    return curve


async def changing(server: ServerProcess, count: int, key: str) -> Curve:
    """Unload a prompt, have it refused, load it and ask it, again and again.

    Raises:
        WrongAnswerError: A status that may not be.
    """
    curve, begun = Curve("cycles"), time.monotonic()
    step = max(1, count // SAMPLES)
    sample(curve, server, 0)
    admin = {"Authorization": f"Bearer {key}"}
    async with client_of(server) as client:
        for number in range(count):
            name = f"prompt-{number % PROMPTS}"
            body = {"model": name, "prompt": "the kettle broke", "max_tokens": 4, "temperature": 0}
            steps = [(f"/v1/prompts/{name}/unload", {}, 200), (ASK, body, 404)]
            steps += [(f"/v1/prompts/{name}/load", {}, 200), (ASK, body, 200)]
            for path, sent, wanted in steps:
                reply = await client.post(path, json=sent, headers=admin)
                curve.came[f"{path.split('/')[-1]}: {reply.status_code}"] += 1
                if reply.status_code != wanted:
                    raise WrongAnswerError(
                        f"{path} of {name} came back with {reply.status_code}: {reply.text[:500]}"
                    )
            if (number + 1) % step == 0:
                sample(curve, server, number + 1)
    curve.seconds, curve.files = time.monotonic() - begun, server.open_files()
    return curve


def client_of(server: ServerProcess) -> httpx.AsyncClient:
    """Return a client that gives its connections up before the server does."""
    return httpx.AsyncClient(base_url=server.address, timeout=900, limits=httpx.Limits(keepalive_expiry=2))


def sample(curve: Curve, server: ServerProcess, done: int) -> None:
    """Note the memory after so many."""
    curve.done.append(done)
    curve.mib.append(server.memory_mib())


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Draw the memory over requests and over cycles, from zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels: Any = figure.subplots(1, len(curves), sharey=True)
    titles = {"requests": "mixed requests", "cycles": "prompts unloaded and loaded again"}
    for panel, curve in zip(panels, curves, strict=True):
        panel.plot(curve.done, curve.mib)
        panel.set_xlabel(titles[curve.what])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("resident memory, MiB")
    panels[0].set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def soaked(folder: Path, requests: int, cycles: int) -> list[Curve]:
    """Write the prompts, start the server, and run both parts."""
    base, root = load_base(str(base_with_chats(folder / "base"))), folder / "prompts"
    base.model.requires_grad_(False)
    for number in range(PROMPTS):
        write_prompt(root / f"prompt-{number}", base, VIRTUAL, seed=number, prefix=number % 4 == 3)
    damaged(root, root / "prompt-0")
    (folder / "keys").write_text("administration\n")
    options = {"--admin-key-file": folder / "keys"}
    server = ServerProcess(root, folder / "log", base=str(folder / "base"), options=options)
    try:
        server.start()
        server.wait()
        curves = [asyncio.run(answering(server, requests, "base"))]
        curves.append(asyncio.run(changing(server, cycles, "administration")))
        server.stop()
    finally:
        server.close()
    return curves


def main() -> None:
    """Run both parts, print the numbers and draw the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="mixed requests")
    parser.add_argument("--cycles", type=int, default=1_000, help="prompts unloaded and loaded")
    parser.add_argument("--plot", type=Path, help="picture of the curves")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = soaked(Path(folder), options.requests, options.cycles)
    if options.plot:
        plot(curves, options.plot)
    if options.json:
        print(json.dumps([curve.numbers() for curve in curves]))
        return
    for curve in curves:
        for name, value in curve.numbers().items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    alone()
    main()
