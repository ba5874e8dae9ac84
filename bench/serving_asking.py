"""Asking a server under load: what comes back is compared at once, and counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import httpx

from serving_cases import Case
from serving_process import ServerProcess, WrongAnswerError

CLOSE = 1e-4
FULL = 429
SECONDS = 120
"""A request that takes longer is stuck."""
_CODES = {404: "model_not_found", 500: "prompt_unusable", FULL: "queue_full"}


@final
@dataclass
class Load:
    """What all clients share while the load runs.

    Attributes:
        server: Who is asked.
        up: Whether it is there to be asked.
        life: How many times it was killed.
        fired: Counts of (what was fired, what came back).
        seen: Counts of statuses, and of "answers", in the present life.
        left: Answers of the present life that nobody waited for, by "begun" and "not begun".
        slowest: Seconds that the slowest answer took.
        files: Files and sockets that the server has open when nobody asks.
    """

    server: ServerProcess
    up: asyncio.Event = field(default_factory=asyncio.Event)
    life: int = 0
    fired: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: Counter[int | str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    files: int = 0

    def begin_life(self) -> None:
        """Count anew: the next process knows nothing of what came before."""
        self.life += 1
        self.seen.clear()
        self.left.clear()

    def client(self) -> httpx.AsyncClient:
        """Return a client of the server."""
        # Connections are given up before the server does so, which may be in the middle of asking.
        limits = httpx.Limits(keepalive_expiry=2)
        return httpx.AsyncClient(base_url=self.server.address, timeout=SECONDS, limits=limits)


def check(case: Case, status: int, reply: Mapping[str, Any]) -> None:
    """Compare a whole reply with what must come.

    Raises:
        WrongAnswerError: It is another.
    """
    if status not in case.status:
        raise WrongAnswerError(f"{case.body} came back with {status}: {reply}")
    if status != 200:
        error = reply.get("error", {})
        if not isinstance(error.get("message"), str):
            raise WrongAnswerError(f"{case.body} was refused without a message: {reply}")
        if status in _CODES and error.get("code") != _CODES[status]:
            raise WrongAnswerError(f"{case.body} was refused for another reason: {reply}")
        return
    wrong = [_wrong(version, reply) for version in (case, *case.others)]
    if all(wrong):
        raise WrongAnswerError(f"{case.body}: {'; '.join(wrong)}")


def _wrong(case: Case, reply: Mapping[str, Any]) -> str:
    """Say how a reply differs from a case's answer; nothing when it does not."""
    if case.scores:
        found = reply["data"][0]["scores"]
        return _apart([found[label] for label, _ in case.scores], [s for _, s in case.scores])
    texts = tuple(choice["text"] for choice in reply["choices"])
    if texts != case.answers:
        return f"gave {texts}, alone it gives {case.answers}"
    if case.logprobs:
        return _apart(reply["choices"][0]["logprobs"]["token_logprobs"], case.logprobs)
    return ""


def _apart(found: Sequence[float], expected: Sequence[float]) -> str:
    most = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    return f"log-probabilities differ by {most}" if most > CLOSE else ""


async def ask(load: Load, client: httpx.AsyncClient, case: Case, what: str, *, stream: bool = False) -> int:
    """Ask until there is an answer, compare it, and return its status.

    A full queue is asked again unless the case says that this may be; so is a server that was
    killed meanwhile. Nothing else may fail.

    Raises:
        WrongAnswerError: The answer is wrong, or there is none.
    """
    while True:
        await load.up.wait()
        life, start = load.life, time.monotonic()
        try:
            status = await (_streamed if stream else _whole)(client, case)
        except httpx.TransportError as error:
            if load.life == life:
                raise WrongAnswerError(f"{case.body} got no answer: {error!r}") from error
            load.fired[what, "cut by the kill"] += 1
            continue
        load.slowest = max(load.slowest, time.monotonic() - start)
        if load.life == life:
            load.seen[status] += 1
            load.seen["answers"] += max(1, len(case.answers)) if status == 200 else 0
        load.fired[what, "right" if status == 200 else str(status)] += 1
        if status != FULL or FULL in case.status:
            return status
        await asyncio.sleep(0.05)


async def _whole(client: httpx.AsyncClient, case: Case) -> int:
    reply = await _post(client, case)
    if reply.status_code == FULL and int(reply.headers["retry-after"]) >= 1:
        return FULL
    check(case, reply.status_code, reply.json())
    return reply.status_code


async def _post(client: httpx.AsyncClient, case: Case) -> httpx.Response:
    if isinstance(case.body, str):
        headers = {"Content-Type": "application/json"}
        return await client.post(case.path, content=case.body, headers=headers)
    return await client.post(case.path, json=case.body)


async def _streamed(client: httpx.AsyncClient, case: Case) -> int:
    """Ask for a stream and put it together; what comes before a cut must be right too."""
    assert isinstance(case.body, Mapping)
    text, logprobs, done = "", [], False
    async with client.stream("POST", case.path, json={**case.body, "stream": True}) as reply:
        if reply.status_code != 200:
            body = json.loads(await reply.aread())
            if reply.status_code != FULL:
                check(case, reply.status_code, body)
            return reply.status_code
        try:
            async for line in reply.aiter_lines():
                done |= line == "data: [DONE]"
                for choice in _choices(case, line):
                    text += choice["text"]
                    logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
        except httpx.TransportError:
            _check_beginning(case, text)
            raise
    if not done:
        raise WrongAnswerError(f"the stream for {case.body} ended in the middle")
    choice = {"text": text, "logprobs": {"token_logprobs": logprobs}}
    check(case, 200, {"choices": [choice]})
    return 200


def _choices(case: Case, line: str) -> list[dict[str, Any]]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return []
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise WrongAnswerError(f"{case.body} broke off: {event}")
    found: list[dict[str, Any]] = event["choices"]
    return found


def _check_beginning(case: Case, text: str) -> None:
    if not any(version.answers[0].startswith(text) for version in (case, *case.others)):
        raise WrongAnswerError(f"{case.body} began with {text!r}, alone {case.answers[0]!r}")


async def leave_stream(load: Load, client: httpx.AsyncClient, case: Case, pieces: int) -> None:
    """Hang up in the middle of a stream."""
    assert isinstance(case.body, Mapping)
    await load.up.wait()
    life, text = load.life, ""
    try:
        async with client.stream("POST", case.path, json={**case.body, "stream": True}) as reply:
            if reply.status_code == 200:
                load.left["begun"] += load.life == life
                async for line in reply.aiter_lines():
                    text += "".join(choice["text"] for choice in _choices(case, line))
                    pieces -= line.startswith("data: ")
                    if pieces <= 0:
                        break
            elif load.life == life:
                load.seen[reply.status_code] += 1
    except httpx.TransportError as error:
        if load.life == life:
            raise WrongAnswerError(f"{case.body} got no answer: {error!r}") from error
    _check_beginning(case, text)
    load.fired["client gone in a stream", "-"] += 1


async def leave_early(load: Load, client: httpx.AsyncClient, case: Case, seconds: float) -> None:
    """Hang up while a whole answer is being made."""
    await load.up.wait()
    life = load.life
    load.left["not begun"] += 1
    try:
        async with asyncio.timeout(seconds):
            await _post(client, case)
    except TimeoutError:
        pass
    except httpx.TransportError as error:
        if load.life == life:
            raise WrongAnswerError(f"{case.body} got no answer: {error!r}") from error
    load.fired["client gone while waiting", "-"] += 1
