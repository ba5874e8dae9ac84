"""The vLLM servers: which of them is asked, and what their failures mean to a client.

They are asked in turn. One that cannot be reached, or is no longer what it was, is set aside for some seconds. What
else fails may be the fault of the request that failed, so the server is asked how it is (``/health``). A request is
sent to the next server only where nothing of it was sent: where one cannot be reached, is no longer what it was, or
has not what the request needs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, final

import httpx

from softprompt.errors import (
    ConfigError,
    NotServingError,
    QueueFullError,
    ServingError,
    SoftPromptError,
    UpstreamError,
    UsageError,
    excerpt,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Body = Mapping[str, Any]

_CONNECT_SECONDS, _ASIDE_SECONDS = 5.0, 10.0
_IDLE_SECONDS = 2.0
"""Less than servers keep idle connections (uvicorn: 5 s), so that none is used that is being closed."""
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_ILL = frozenset({401, 403, 404, 405, 502, 503})
"""Statuses that no client's request is the cause of: address, key and the model's name are ours."""


@dataclass(frozen=True, slots=True)
class UpstreamFacts:
    """What a server says, or shows, of itself.

    Attributes:
        model: The name of its model in requests.
        version: vLLM's; empty is unknown, as routers before it do not say.
        context_length: Most tokens of input and answer; None is unknown.
        takes_embeds: Whether inputs may be embeddings (``--enable-prompt-embeds``).
        takes_parts: Whether embeddings may also stand beside a text, which a chat template passes on as it is.
    """

    model: str
    version: str = ""
    context_length: int | None = None
    takes_embeds: bool = False
    takes_parts: bool = False


class UpstreamRequest(NamedTuple):
    """A request to a server: path and body; and for a text beside embeddings the token ids that it must become."""

    path: str
    body: Body
    ids: Sequence[int] | None = None
    at: int = 0


@final
class UpstreamServer:
    """One server; ``facts`` are None until it was asked for them, and asked for again where it is not ``known``.

    Where it is ``doubted`` they are asked for beside its requests, which none of them holds up.
    """

    def __init__(self, address: str, client: httpx.AsyncClient) -> None:
        self.address = address.rstrip("/")
        self.facts: UpstreamFacts | None = None
        self.known = self.doubted = False
        self.aside_until = 0.0
        self.client = client
        self.asking = asyncio.Lock()
        self.examined: asyncio.Task[None] | None = None

    async def send(self, path: str, body: bytes | None) -> httpx.Response:
        """Send a request, a GET if it has no body, and return the head of the answer, whose rest is to be read."""
        sending = self.client.build_request("POST" if body else "GET", self.address + path, content=body)
        return await self.client.send(sending, stream=True)

    async def whole(self, path: str, body: Body | None = None, *, absent: Any = None) -> Any:
        """Send a small request and return its JSON answer, or what is given for a path that is ``absent``.

        Raises as ``refusal_of``.
        """
        response = await self.send(path, None if body is None else json.dumps(body).encode())
        try:
            data = await response.aread()
            if response.status_code in (404, 405) and absent is not None:
                return absent
            if response.status_code != 200:
                raise refusal_of(response.status_code, data)
            return json.loads(data)
        finally:
            await response.aclose()


Ask = Callable[[UpstreamServer], Coroutine[Any, Any, UpstreamFacts]]


@final
class Fleet:
    """All servers, and the thread whose event loop talks to them.

    Args:
        addresses: Where they are, such as ``http://host:8000``.
        ask: Asks a server for its facts.
        seconds: How long a server may send nothing.
        key: Their API key, if they want one.

    Attributes:
        servers: The servers.
        errors: Failures so far, by address and kind.

    Raises:
        UsageError: The certificates that the environment names cannot be read.
    """

    def __init__(self, addresses: Sequence[str], ask: Ask, *, seconds: float, key: str | None = None) -> None:
        headers = {"content-type": "application/json"}
        headers |= {} if key is None else {"authorization": f"Bearer {key}"}
        client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(seconds, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_SECONDS),
            trust_env=False,  # no proxies, no .netrc; of the environment the certificates alone
            verify=_certificates(),
        )
        self.servers = [UpstreamServer(each, client) for each in addresses]
        self.errors: Counter[tuple[str, str]] = Counter()
        self._ask = ask
        self._client = client
        self._turn = 0
        self._stopped = False
        self._guard = threading.Lock()
        # Questions are made beside the loop, one at a time and in their order, so that answers are read meanwhile.
        self._maker = ThreadPoolExecutor(1, "softprompt-questions")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="softprompt-upstream", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether some server is not set aside."""
        return self._thread.is_alive() and any(each.aside_until <= time.monotonic() for each in self.servers)

    @property
    def facts(self) -> list[UpstreamFacts]:
        """What is known of the servers that were asked."""
        return [each.facts for each in self.servers if each.facts is not None]

    def run(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run something in the thread; cancelling what is returned cancels it.

        Raises:
            NotServingError: It has been stopped.
        """
        with self._guard:  # what is given to a loop that ends would be waited for without end
            if not self._stopped:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise NotServingError("serving has stopped and takes no more requests; ask another server")

    async def ask_all(self) -> None:
        """Ask every server for its facts; raises UpstreamError, with the reasons, where none can be used."""
        problems = []
        for server in self.servers:
            try:
                with self._failing(server, asking=True):
                    await self._known(server)
            except (*_NOT_SENT, ServingError) as error:
                problems.append(f"{server.address}: {error}")
        if len(problems) == len(self.servers):
            raise UpstreamError(f"no vLLM server can be used ({'; '.join(problems)})")

    async def whole(self, make: Callable[[UpstreamFacts], UpstreamRequest]) -> Any:
        """Return the JSON answer to what ``make`` asks of the server whose turn it is; raises as ``events``."""
        async with self._sent(make) as (question, response):
            answer = await self._beside(json.loads, await response.aread())
            if question.ids is not None:
                check_ids(question, answer.get("prompt_token_ids") or ())
            return answer

    async def events(self, make: Callable[[UpstreamFacts], UpstreamRequest]) -> AsyncGenerator[Body]:
        """Yield the events of a streamed answer; leaving early hangs up, which ends it there.

        Raises:
            UpstreamError: No server can be reached, or it failed.
            QueueFullError: The server has too many requests.
            ServingError: The server refuses the request.
        """
        async with self._sent(make) as (question, response):
            checked = question.ids is None
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise refusal_of(500, data.encode())
                if not checked:  # the first event has them
                    check_ids(question, event.get("prompt_token_ids") or ())
                    checked = True
                yield event
            raise httpx.RemoteProtocolError("the stream has no end")

    def stop(self) -> None:
        """End everything that runs, and the thread."""
        with self._guard:
            first, self._stopped = not self._stopped, True
        if first:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._maker.shutdown(wait=False, cancel_futures=True)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    @asynccontextmanager
    async def _sent(
        self, make: Callable[[UpstreamFacts], UpstreamRequest]
    ) -> AsyncIterator[tuple[UpstreamRequest, httpx.Response]]:
        """Send a request and give its answer, of the status 200, whose body is left to be read."""
        server, question, response = await self._reached(make)
        with self._failing(server):
            try:
                if response.status_code != 200:
                    raise refusal_of(response.status_code, await response.aread())
                yield question, response
            finally:
                await response.aclose()

    async def _reached(
        self, make: Callable[[UpstreamFacts], UpstreamRequest]
    ) -> tuple[UpstreamServer, UpstreamRequest, httpx.Response]:
        """Send a request to the first server that can be reached and has what it needs, once."""
        problem: SoftPromptError | None = None
        for server in self._in_turn():
            try:
                with self._failing(server, asking=True):
                    facts = await self._known(server)
                question, body = await self._beside(_made, make, facts)
            except _NOT_SENT:
                continue
            except (ConfigError, ServingError) as error:
                problem = error
                continue
            with suppress(*_NOT_SENT), self._failing(server):
                return server, question, await server.send(question.path, body)
        raise problem or UpstreamError("none of the vLLM servers behind this one can be reached; try again later")

    async def _beside(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run something in the thread beside the loop; cancelled before its turn, it does not run."""
        return await self._loop.run_in_executor(self._maker, function, *args)

    async def _known(self, server: UpstreamServer) -> UpstreamFacts:
        async with server.asking:
            if server.facts is None or not server.known:
                server.facts = await self._ask(server)
                server.known = True
            return server.facts

    def _in_turn(self) -> list[UpstreamServer]:
        """Return the servers in the order in which they are tried.

        Last come those set aside, the longest ago first, and those that are being asked what they are.
        """
        first, self._turn = self._turn, (self._turn + 1) % len(self.servers)
        now = time.monotonic()
        turned = self.servers[first:] + self.servers[:first]
        aside = {each: now if each.asking.locked() else each.aside_until for each in turned}
        return sorted(turned, key=lambda server: aside[server] if aside[server] >= now else 0.0)

    @contextmanager
    def _failing(self, server: UpstreamServer, *, asking: bool = False) -> Iterator[None]:
        """Count and translate what goes wrong; ``asking`` is of ours alone, and no client's request is in it."""
        try:
            yield
        except _NOT_SENT as error:
            self._failed(server, "connect", error, ill=True)
            raise
        except httpx.TimeoutException as error:
            self._failed(server, "timeout", error, ill=asking)
            raise UpstreamError("the vLLM server behind this one did not answer in time; try again") from error
        except (httpx.HTTPError, json.JSONDecodeError, UnicodeDecodeError) as error:
            server.doubted = True  # it may have been another one's end
            self._failed(server, "broken", error, ill=asking)
            raise UpstreamError("the vLLM server behind this one broke off; try again") from error
        except UpstreamError as error:
            server.doubted |= isinstance(error, _OtherTokensError)  # its template may be another
            self._failed(server, "status", error, ill=asking or isinstance(error, _IllError))
            raise

    def _failed(self, server: UpstreamServer, kind: str, error: Exception, *, ill: bool) -> None:
        self.errors[server.address, kind] += 1
        if ill:
            self._set_aside(server, error)
        elif not self._stopped and (server.examined is None or server.examined.done()):
            server.examined = self._loop.create_task(self._examine(server))

    async def _examine(self, server: UpstreamServer) -> None:
        """Set a server aside unless it says that it is well; one that has no ``/health`` is there at least."""
        try:
            response = await server.client.get(f"{server.address}/health", timeout=_CONNECT_SECONDS)
            if response.status_code >= 500:
                raise refusal_of(response.status_code, response.content)
            while server.doubted:
                server.doubted = False
                server.facts = await self._ask(server)
        except (httpx.HTTPError, UpstreamError) as error:
            self._set_aside(server, error)
        except ServingError:  # too busy to be asked
            server.known = False

    def _set_aside(self, server: UpstreamServer, error: Exception) -> None:
        server.aside_until = time.monotonic() + _ASIDE_SECONDS
        server.known = False  # what comes back may be another one
        logger.warning("%s is set aside for %g s: %s", server.address, _ASIDE_SECONDS, str(error) or repr(error))


@final
class _IllError(UpstreamError):
    """What a server answers that no request to it is the cause of."""


@final
class _OtherTokensError(UpstreamError):
    """A text became other tokens: a chat template adds to all of them, or trims the one that a client sent."""


def _certificates() -> Any:
    try:
        return httpx.create_ssl_context()  # SSL_CERT_FILE, SSL_CERT_DIR, or certifi's
    except OSError as error:
        raise UsageError(
            f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read ({error}); correct it"
        ) from error


def _made(make: Callable[[UpstreamFacts], UpstreamRequest], facts: UpstreamFacts) -> tuple[UpstreamRequest, bytes]:
    """Make a question and its bytes, and keep of it what its answer is checked against."""
    question = make(facts)
    return question._replace(body={}), json.dumps(question.body).encode()


def refusal_of(status: int, data: bytes) -> Exception:
    """Return the error that a server's answer means: ours to repair, the client's, or nobody's."""
    try:
        said = json.loads(data)["error"]
        why = excerpt(str(said["message"] if isinstance(said, dict) else said), 300)
    except (ValueError, KeyError, TypeError):
        why = f"status {status}"
    if status in (400, 413, 422):
        return ServingError(f"vLLM refuses the request: {why}")
    if status == 429:
        return QueueFullError(f"vLLM has too many requests ({why}); try again later", 1.0)
    if status in (401, 403):
        why = f"it wants an API key ({why}), which --upstream-key-file gives"
    kind = _IllError if status in _ILL else UpstreamError
    return kind(f"the vLLM server behind this one failed: {why}", status=503 if status == 503 else 502)


def check_ids(question: UpstreamRequest, seen: Sequence[int]) -> None:
    """Raise UpstreamError unless a text beside embeddings became the tokens that it stands for."""
    assert question.ids is not None
    virtual = len(seen) - len(question.ids)
    if [*seen[: question.at], *seen[question.at + virtual :]] != list(question.ids):
        raise _OtherTokensError(
            "the vLLM server behind this one reads other tokens than were meant; see its chat template"
        )
