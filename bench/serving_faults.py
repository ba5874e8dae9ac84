"""What goes wrong while a server is under load, one thing after the other, each with its consequence."""

from __future__ import annotations

import asyncio
import json
import random
import select
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serving_asking import FULL, Load, ask
from serving_cases import ASK, Case
from serving_process import ServerProcess, WrongAnswerError
from softprompt.artifacts import staged_folder, write_folder

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "softprompt.json"

UNREAD = 36
"""Answers of the stream that nobody reads: more than the sockets hold."""


@dataclass(frozen=True)
class Changing:
    """A prompt whose files change.

    Attributes:
        folder: Where it is served from.
        versions: Folders with its versions.
        cases: Requests for it, which any version may answer.
    """

    folder: Path
    versions: Sequence[Path]
    cases: Sequence[Case]

    def case(self, number: int, version: int) -> Case:
        """Return a request that only one version answers rightly."""
        case = self.cases[number % len(self.cases)]
        return replace((case, *case.others)[version], status=(200,))


def overwritten(folder: Path, version: Path) -> None:
    """Put a version in place as `softprompt tune --overwrite` does."""
    write_folder(folder, {file.name: file.read_bytes() for file in version.iterdir()})


def exchanged(folder: Path, version: Path) -> None:
    """Put a version in place as a whole folder; for a moment there is none."""
    with staged_folder(folder) as staged:
        for file in version.iterdir():
            shutil.copy(file, staged)


def copied(folder: Path, version: Path) -> None:
    """Copy a version's files over those in place, one after the other."""
    folder.mkdir(exist_ok=True)
    for file in version.iterdir():
        shutil.copy(file, folder)


WAYS = (overwritten, exchanged, copied)


def truncated(folder: Path) -> None:
    """Cut the weights off in the middle."""
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(folder: Path) -> None:
    """Leave nothing in the file of the weights."""
    (folder / WEIGHTS).write_bytes(b"")


def flipped(folder: Path) -> None:
    """Change one byte of the weights."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def weights_deleted(folder: Path) -> None:
    """Delete the weights."""
    (folder / WEIGHTS).unlink()


def config_garbled(folder: Path) -> None:
    """Write a configuration that is no JSON."""
    (folder / CONFIG).write_text('{"peft_type": ')


def record_garbled(folder: Path) -> None:
    """Write a record that is no JSON."""
    (folder / RECORD).write_bytes(b"\xff{")


def linked_out(folder: Path) -> None:
    """Have the weights be a link to a file elsewhere."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/hostname")


def deleted(folder: Path) -> None:
    """Delete the prompt."""
    shutil.rmtree(folder)


DAMAGES: Sequence[tuple[Callable[[Path], None], int]] = (
    (truncated, 500),
    (deleted, 404),
    (emptied, 500),
    (flipped, 500),
    (weights_deleted, 500),
    (config_garbled, 500),
    (record_garbled, 500),
    (linked_out, 500),
)
"""Ways to spoil a prompt, and the status of requests for it."""


async def cycles(load: Load, changing: Sequence[Changing], crowd: Case, seconds: float) -> int:
    """Let everything go wrong, again and again, with a kill in the middle; return the rounds."""
    start, rounds, rng = time.monotonic(), 0, random.Random(7)
    async with load.client() as client:

        async def one_round() -> None:
            nonlocal rounds
            rounds += 1
            async with asyncio.TaskGroup() as group:
                for each in changing:
                    group.create_task(spoiled(load, client, each, rng))
                group.create_task(crowded(load, crowd))
                group.create_task(hostile(load))

        while rounds == 0 or time.monotonic() < start + seconds / 2:
            await one_round()
        await killed(load)
        killed_at = rounds
        while rounds == killed_at or time.monotonic() < start + seconds:
            await one_round()
    return rounds


async def spoiled(load: Load, client: Any, prompt: Changing, rng: random.Random) -> None:
    """Replace and damage one prompt in every way; each next request must see it."""
    number, version = rng.randrange(99), 0
    for way in WAYS:
        version = 1 - version
        await asyncio.to_thread(way, prompt.folder, prompt.versions[version])
        await ask(load, client, prompt.case(number, version), f"prompt {_name(way)}")
        number += 1
    for damage, status in rng.sample(DAMAGES, len(DAMAGES)):
        await asyncio.to_thread(damage, prompt.folder)
        spoilt = replace(prompt.case(number, version), status=(status,))
        await ask(load, client, spoilt, f"prompt {_name(damage)}")
        await asyncio.to_thread(_put_back, prompt.folder, prompt.versions[version])
        await ask(load, client, prompt.case(number, version), "prompt put back")
        number += 1


def _put_back(folder: Path, version: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    copied(folder, version)


def _name(change: Callable[..., None]) -> str:
    return change.__name__.replace("_", " ")


async def crowded(load: Load, crowd: Case, at_once: int = 16, tries: int = 20) -> None:
    """Ask for so much at once that the queue is full; the rest is answered.

    Raises:
        WrongAnswerError: It never was.
    """
    async with load.client() as client:
        for _ in range(tries):
            asked = (ask(load, client, crowd, "request in a crowd") for _ in range(at_once))
            if FULL in await asyncio.gather(*asked):
                return
    raise WrongAnswerError("the queue is never full")


async def killed(load: Load) -> None:
    """Kill the process and start another; it has nothing but the prompts' folder."""
    load.up.clear()
    load.begin_life()
    await asyncio.to_thread(load.server.kill)
    load.server.start()
    await asyncio.to_thread(load.server.wait)
    load.files = load.server.open_files()
    load.fired["server killed and started again", "-"] += 1
    load.up.set()


async def hostile(load: Load) -> None:
    """Send what no client would, all at the same time."""
    ok: dict[str, Any] = {"model": "prompt-0", "prompt": "x", "max_tokens": 1}
    large = json.dumps({**ok, "prompt": "x" * 10_000_000}).encode()
    # Megabytes at little cost: the scores of the input, once for each answer.
    scores: dict[str, Any] = {"prompt": [[5] * 400] * 3, "echo": True, "logprobs": 20}
    long = {**ok, **scores, "n": UNREAD // 3, "stream": True}
    async with asyncio.TaskGroup() as group:
        for what, data, status in (
            ("10 MB body", _post(large), 413),
            ("10 MB body in chunks", _chunked(large), 413),
            ("half a body, then silence", _post(json.dumps(ok).encode())[:-9], 408),
            ("a length that is none", _post(b"{}").replace(b": 2", b": -2"), None),
            ("no HTTP", b"\x00\x01 hello\r\n\r\n", None),
        ):
            group.create_task(_sent(load, what, data, status))
        group.create_task(_unread(load, _post(json.dumps(long).encode())))


async def _sent(load: Load, what: str, data: bytes, status: int | None) -> None:
    """Send bytes; None for what the HTTP layer refuses by itself, with 400."""
    said = await asyncio.to_thread(_exchange, load.server.port, data)
    came = int(said.split(maxsplit=2)[1]) if said.startswith(b"HTTP/1.1 ") else None
    if came != (status or 400):
        raise WrongAnswerError(f"{what} came back with {said[:300]!r}")
    if status is not None:
        load.seen[status] += 1
    load.fired[what, str(came)] += 1


def _exchange(port: int, data: bytes) -> bytes:
    """Send bytes, and return all that comes until the other side hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        try:
            sock.sendall(data)
        except OSError:
            pass  # refused before all of it was sent; the answer is there to be read
        return _all_of(sock)


async def _unread(load: Load, data: bytes) -> None:
    """Ask for a long stream and do not read it until it is too late.

    Raises:
        WrongAnswerError: It was sent whole.
    """
    load.left["begun"] += 1
    load.left["not begun"] += UNREAD - 1  # its other answers
    while (said := await asyncio.to_thread(_read_late, load.server, data)).split()[1:2] == [b"429"]:
        load.seen[FULL] += 1
    if not said.startswith(b"HTTP/1.1 200") or b"[DONE]" in said:
        raise WrongAnswerError(f"a reader that stalls got {said[:300]!r}...{said[-300:]!r}")
    load.fired["stream left unread", "hung up on"] += 1


def _read_late(server: ServerProcess, data: bytes) -> bytes:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(60)
        sock.connect(("127.0.0.1", server.port))
        before = server.hung_up()
        sock.sendall(data)
        end = time.monotonic() + 60
        while server.hung_up() == before and time.monotonic() < end:
            if select.select([sock], [], [], 0.1)[0] and b" 429 " in sock.recv(99, socket.MSG_PEEK):
                break
            time.sleep(0.1)
        return _all_of(sock)


def _all_of(sock: socket.socket) -> bytes:
    said = b""
    try:
        while piece := sock.recv(65536):
            said += piece
    except ConnectionError:
        pass
    return said


def _post(body: bytes) -> bytes:
    return _head(f"Content-Length: {len(body)}") + body


def _chunked(body: bytes) -> bytes:
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return _head("Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n"


def _head(length: str) -> bytes:
    lines = (
        f"POST {ASK} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Connection: close",
        length,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"
