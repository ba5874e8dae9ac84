"""Requests answered by vLLM servers: their tokens become the events of a ticket, as the batcher's do."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, final

from softprompt.engine import check_context
from softprompt.errors import NotServingError, QueueFullError, UpstreamError
from softprompt.generation import BatcherStats, EchoEvent, Job, Ticket, TopLogProbs, check_request

if TYPE_CHECKING:
    from softprompt.backbone import Base
    from softprompt.generation import Answer, AnswerRules, Bounds, Request
    from softprompt.server.upstream.carriage import Carriage
    from softprompt.server.upstream.fleet import Fleet, UpstreamFacts, UpstreamRequest

_ID = "token_id:"


@final
class UpstreamAnswers:
    """Runs requests on servers elsewhere: the counterpart of ``Batcher``.

    Stop sequences, an answer's end, its text and its time are ours, from the ids that come, so they are the same
    whatever computes. A connection that is closed ends the answer on its server.

    Args:
        base: The base, with its embedding alone.
        bounds: ``max_queue`` is how many requests may be open.
        rules: How answers end, and become text.
        carriage: Puts requests to servers.
        fleet: The servers, which answer.
    """

    def __init__(self, base: Base, bounds: Bounds, rules: AnswerRules, carriage: Carriage, fleet: Fleet) -> None:
        self.bounds = bounds
        self.reason = _known(fleet)
        self._base = base
        self._rules = rules
        self._carriage = carriage
        self._fleet = fleet
        self._open: dict[Ticket, int] = {}
        self._changed = threading.Condition()
        self._closing = False

    @property
    def engine(self) -> str:
        """What runs the requests."""
        return "vllm"

    @property
    def healthy(self) -> bool:
        """Whether some server is not set aside."""
        return self._fleet.healthy

    @property
    def failure(self) -> Exception | None:
        """Why none is."""
        return None if self.healthy else UpstreamError("no vLLM server behind this one can be used")

    @property
    def stats(self) -> BatcherStats:
        """The counters now."""
        with self._changed:
            return BatcherStats(running=sum(self._open.values()), upstream_errors=dict(self._fleet.errors))

    def submit(self, request: Request) -> Ticket:
        """Send a request; any thread may call.

        Raises:
            SoftPromptError: The request could never be run.
            QueueFullError: Too many are open.
            NotServingError: The server is stopping.
        """
        check_request(self._base, request)
        self._carriage.check(request)
        limits = [facts.context_length for facts in self._fleet.facts if facts.context_length]
        check_context(len(request.ids), request.virtual_tokens, min(limits, default=None), new=request.new_tokens)
        with self._changed:
            if self._closing:
                raise NotServingError("serving is stopping and takes no more requests; ask another server")
            if len(self._open) >= self.bounds.max_queue:
                raise QueueFullError(
                    f"{len(self._open)} requests are open, which is max_queue; try again later", 1.0
                )
            ticket = Ticket(request, lambda: work.cancel())  # noqa: PLW0108 - made below
            job = Job.of(ticket, self._rules)
            work = self._fleet.run(self._answered(job))
            self._open[ticket] = request.n
        # Of one that is cancelled before it begins, nothing runs.
        work.add_done_callback(lambda _: self._ended(job, work.cancelled()))
        return ticket

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that are here; False if that took too long."""
        with self._changed:
            self._closing = True
            return self._changed.wait_for(lambda: not self._open, timeout)

    def stop(self) -> None:
        """End all requests, with the reason "cancelled", and the thread that talks to the servers."""
        with self._changed:
            self._closing = True
            tickets = list(self._open)
        for ticket in tickets:
            ticket.cancel()
        self._fleet.stop()

    async def _answered(self, job: Job) -> None:
        seconds = None if job.deadline == math.inf else max(0.0, job.deadline - time.monotonic())
        try:
            async with asyncio.timeout(seconds):
                if job.request.echo:
                    job.ticket.push(await self._echo(job.request), last=not job.request.generate)
                async with asyncio.TaskGroup() as group:
                    for answer in job.answers:
                        group.create_task(self._stream(job, answer))
        except TimeoutError:
            job.close()
        except BaseExceptionGroup as group_error:
            job.fail(first_of(group_error))
        except Exception as error:  # whatever a server sends, its request fails alone
            job.fail(error)

    def _ended(self, job: Job, cancelled: bool) -> None:
        if cancelled:
            job.ticket.cancel()
            job.close()
        with self._changed:
            del self._open[job.ticket]
            self._changed.notify_all()

    async def _stream(self, job: Job, answer: Answer) -> None:
        """Take the tokens of one answer until it ends."""

        def question(facts: UpstreamFacts) -> UpstreamRequest:
            return self._carriage.question(job.request, facts, answer.seed)

        async with aclosing(self._fleet.events(question)) as events:
            async for event in events:
                for choice in event.get("choices", ()):
                    for token, logprob, top in tokens_of(choice, job.request.logprobs):
                        job.send(answer.add(token, logprob, top))
                        if answer.ended_by is not None:
                            return
                    if choice.get("finish_reason") == "stop":  # of a form, which vLLM ends
                        answer.ended_by = "eos_token"
                        job.send([answer.finish()])
                        return
        raise UpstreamError("the vLLM server behind this one ended an answer early; try again")

    async def _echo(self, request: Request) -> EchoEvent:
        """Return the log-probabilities of an input that is put as ids."""
        count = request.logprobs or 0
        more = {"max_tokens": 1, "stream": False, "min_tokens": 0, "prompt_logprobs": count}
        answer = await self._fleet.whole(lambda facts: self._carriage.question(request, facts, **more))
        scores = answer["choices"][0]["prompt_logprobs"]
        virtual = len(scores) - len(request.ids)
        scores = [*scores[: request.at], *scores[request.at + virtual :]]
        values: list[float | None] = [None]
        likeliest: list[TopLogProbs] = [()]
        for token, found in list(zip(request.ids, scores, strict=True))[1:]:
            own = {int(name): float(each["logprob"]) for name, each in found.items()}
            values.append(own[token])
            likeliest.append(_likeliest({i: v for i, v in own.items() if i not in self._carriage.extra}, count))
        return EchoEvent(request.ids, tuple(values), tuple(likeliest))


def tokens_of(choice: Mapping[str, Any], count: int | None) -> list[tuple[int, float | None, TopLogProbs]]:
    """Return the tokens of a piece of a stream, with log p and the ``count`` likeliest tokens if wanted."""
    ids = choice.get("token_ids") or ()
    if count is None or not ids:
        return [(token, None, ()) for token in ids]
    scores = zip(ids, scores_of(choice), strict=True)
    return [(token, logprob, _likeliest(top, count)) for token, (logprob, top) in scores]


def scores_of(choice: Mapping[str, Any]) -> list[tuple[float | None, dict[int, float]]]:
    """Return log p of each token of a choice, and of those listed beside it, in either route's shape."""
    found = choice["logprobs"]
    if "content" in found:
        return [
            (each["logprob"], {_id(top["token"]): top["logprob"] for top in each["top_logprobs"]})
            for each in found["content"]
        ]
    listed = [{_id(name): value for name, value in (top or {}).items()} for top in found["top_logprobs"]]
    return list(zip(found["token_logprobs"], listed, strict=True))


def _id(name: str) -> int:
    return int(name.removeprefix(_ID))


def _likeliest(found: Mapping[int, float], count: int) -> TopLogProbs:
    return tuple(sorted(found.items(), key=lambda pair: -pair[1])[:count])


def first_of(group: BaseExceptionGroup[BaseException]) -> Exception:
    """Return the first error of a group."""
    error = group.exceptions[0]
    if isinstance(error, BaseExceptionGroup):
        return first_of(error)
    return error if isinstance(error, Exception) else UpstreamError(f"an answer failed ({type(error).__name__})")


def _known(fleet: Fleet) -> str:
    """Return what to say of the servers that were asked."""
    ways = {
        f"vLLM {facts.version or '(version unknown)'}, prompts as "
        + ("embeddings beside text" if facts.takes_parts else "embeddings" if facts.takes_embeds else "ids")
        for facts in fleet.facts
    }
    return "; ".join(sorted(ways))
