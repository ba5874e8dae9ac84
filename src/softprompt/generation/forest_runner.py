"""Requests over the decode forest: which rows run, what each pass runs, and what its logits are used for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from softprompt.backbone import Base
from softprompt.engine import DecodeForest, Key, Lane, NewTokens, ResidentPrompts, Wanted
from softprompt.generation.answer import Admission, Answer, Echo, Job, model_failed, not_finite, scored
from softprompt.generation.options import Bounds
from softprompt.generation.request import Request, beyond_bounds, check_request
from softprompt.generation.ticket import TopLogProbs

_NO_TEXT = -1


@dataclass(frozen=True, slots=True)
class Prefill:
    """The ids of a request that are run before its first new token.

    Attributes:
        ids: Its ids, a prompt's from V on.
        followers: The input token that follows each id, -1 where another id does, or none.
        key: Under which key its prompt is kept, None when no other request can use it.
        kept_tokens: Tokens of the lane that a kept prompt fills.
        kept_ids: How many of ``ids`` they stand for; none when the prompt is keys and values.
    """

    ids: tuple[int, ...]
    followers: tuple[int, ...]
    key: Key | None = None
    kept_tokens: int = 0
    kept_ids: int = 0

    @classmethod
    def of(cls, request: Request, vocabulary: int) -> Prefill:
        """Return the ids of a request; ``vocabulary`` is V."""
        prompt, at = request.prompt, request.at
        text = list(enumerate(request.ids))
        if prompt is None:
            return cls(request.ids, _followers(text))
        if prompt.prefix is not None:
            return cls(request.ids, _followers(text), (prompt.key, ()), prompt.tokens, 0)
        virtual = [(_NO_TEXT, vocabulary + i) for i in range(prompt.input_tokens)]
        whole = [*text[:at], *virtual, *text[at:]]
        ids = tuple(token for _, token in whole)
        # Behind all of its input a prompt is this row's alone; tokens before it that are to be scored must be run.
        if not virtual or at == len(text) or (request.echo and at):
            return cls(ids, _followers(whole))
        end = at + len(virtual)
        return cls(ids, _followers(whole), (prompt.key, request.ids[:at]), end, end)


def _followers(whole: list[tuple[int, int]]) -> tuple[int, ...]:
    """Return the input token behind each id; the first input token is never scored."""
    return (*(token if number > 0 else -1 for number, token in whole[1:]), -1)


@dataclass(slots=True, eq=False)
class ForestRow:
    """One row in the forest, with its slot in the cache.

    Attributes:
        spare: While it reads, the slots of the request's other answers.
        done: How many ids it has read.
        keeps: Whether its prompt is to be kept once it was read.
        answer: Its answer, once its input was read.
        echo: The input's scores, where they are wanted.
    """

    job: Job
    prefill: Prefill
    lane: Lane
    spare: list[Lane]
    done: int = 0
    keeps: bool = False
    answer: Answer | None = None
    echo: Echo | None = None

    @property
    def is_reading(self) -> bool:
        """Whether some of its input was not read yet."""
        return self.done < len(self.prefill.ids)

    def next_tokens(self, budget: int) -> NewTokens:
        """Return what it runs next: its last token, or at most ``budget`` of its input."""
        if self.answer is not None:
            return NewTokens(self.lane, (self.answer.tokens[-1],))
        prompt = self.job.request.prompt
        ids = self.prefill.ids[self.done : self.done + budget]
        wanted: Wanted = "last" if self.done + len(ids) == len(self.prefill.ids) else "none"
        if self.echo is not None:
            wanted = "all"
        tokens = None if prompt is None or prompt.input is None else prompt.input.detach()
        return NewTokens(self.lane, ids, tokens, wanted)

    def read(self, count: int, logits: Tensor) -> None:
        """Note that ``count`` of its ids were read, and score the input by their logits."""
        if self.echo is not None:
            followers = self.prefill.followers[self.done : self.done + count]
            self.echo.add(logits, followers, self.job.request.logprobs or 0)
        self.done += count


Work = list[tuple[ForestRow, NewTokens]]
"""The rows of a pass, each with the tokens that it runs."""

Score = tuple[float | None, TopLogProbs]
"""log p of a token, and the most likely tokens; (None, ()) where they are not wanted."""


@final
class ForestRunner:
    """Continuous batching: runs jobs in one decode forest; the thread that steps it owns it."""

    name = "forest"

    def __init__(self, base: Base, bounds: Bounds) -> None:
        self.forest = DecodeForest(base, bounds.max_cached_tokens, ordered_weights=bounds.ordered_weights)
        self.residents = ResidentPrompts(bounds.max_prompts_resident, bounds.max_prompt_tokens)
        self._base = base
        self._bounds = bounds
        self._rows: list[ForestRow] = []

    @property
    def rows(self) -> int:
        """Answers that run or will: a lane each."""
        return sum(1 + len(each.spare) for each in self._rows)

    @property
    def cached_tokens(self) -> int:
        """Tokens that there is memory for, whether or not rows use it now."""
        return self.forest.store.allocated

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run."""
        return list(dict.fromkeys(each.job for each in self._rows))

    def check(self, request: Request) -> None:
        """Refuse a request that could never run: as ``check_request``, or beyond the bounds."""
        check_request(self._base, request)
        need = _need(request)
        if request.n > self._bounds.max_batch_rows or not self.forest.store.fits(need, request.n):
            raise beyond_bounds(request, need, self._bounds)

    def admit(self, job: Job) -> Admission:
        """Start a job, unless there is no room, or another is just computing the same prompt."""
        request = job.request
        if self.rows + request.n > self._bounds.max_batch_rows:
            return "no room"
        prefill = Prefill.of(request, self.forest.vocabulary)
        if prefill.key and any(each.keeps and each.prefill.key == prefill.key for each in self._rows):
            return "later"
        lanes = self.forest.store.take(_need(request), request.n)
        if lanes is None:
            return "no room"
        row = ForestRow(job, prefill, lanes[0], lanes[1:])
        row.echo = Echo() if request.echo else None
        # Until its first logits are seen to be finite.
        row.lane.tainted = True
        self._rows.append(row)
        self._fill(row)
        return "started"

    def step(self) -> None:
        """Run one pass for the jobs that run, and emit its events."""
        for job in self.jobs:
            if job.is_over:
                self._leave(job)
                job.close()
        work = self._planned()
        if not work:
            return
        try:
            parts = self.forest.step([new for _, new in work])
        except Exception:  # whatever a model's own code raises: find the row it is about
            work, parts = self._one_by_one(work)
        self._use(work, parts)

    def _fill(self, row: ForestRow) -> None:
        """Give a new row the keys and values of its prompt, if there are any yet."""
        key, prompt = row.prefill.key, row.job.request.prompt
        if key is None or prompt is None:
            return
        kept = self.residents.find(key)
        if kept is None and prompt.prefix is not None:
            kept = self.forest.store.converted(prompt.prefix)
            self.residents.keep(key, kept)
        if kept is None:
            row.keeps = True
            return
        self.forest.store.fill(row.lane, kept)
        row.done = row.prefill.kept_ids

    def _planned(self) -> Work:
        """Schedule a pass: one token of every answer, and inputs in parts beside them (chunked prefill)."""
        answering = [each for each in self._rows if each.answer is not None]
        work = [(each, each.next_tokens(1)) for each in answering]
        budget = self._bounds.step_tokens(len(work)) - len(work)
        for each in self._rows:
            if each.answer is None and budget > 0:
                work.append((each, each.next_tokens(budget)))
                budget -= len(work[-1][1].ids)
        return work

    def _one_by_one(self, work: Work) -> tuple[Work, list[Tensor]]:
        """Run rows alone, and fail those that cannot be run."""
        done: Work = []
        parts: list[Tensor] = []
        for row, new in work:
            if not any(row is each for each in self._rows):
                continue
            try:
                parts += self.forest.step([new])
                done.append((row, new))
            except Exception as cause:  # as above
                self._leave(row.job)
                row.job.fail(model_failed(cause))
        kept = [i for i, (each, _) in enumerate(done) if each in self._rows]
        return [done[i] for i in kept], [parts[i] for i in kept]

    def _use(self, work: Work, parts: list[Tensor]) -> None:
        """Note what was read, and give every answer its next token."""
        ready: list[tuple[ForestRow, Answer]] = []
        rows: list[Tensor] = []
        for (row, new), logits in zip(work, parts, strict=True):
            if row.answer is None:
                row.read(len(new.ids), logits)
                self._keep(row)
                if row.is_reading:
                    continue
                ready += self._answering(row)
            else:
                ready.append((row, row.answer))
            rows += [logits[-1]] * (len(ready) - len(rows))
        if ready:
            self._choose(ready, torch.stack(rows))

    def _keep(self, row: ForestRow) -> None:
        """Keep a prompt's keys and values as soon as they are there."""
        prefill = row.prefill
        if row.keeps and prefill.key and row.done >= prefill.kept_ids:
            self.residents.keep(prefill.key, self.forest.store.read(row.lane, prefill.kept_tokens))
            row.keeps = False

    def _answering(self, row: ForestRow) -> list[tuple[ForestRow, Answer]]:
        """Return the answers that begin behind an input, each with a row of its own."""
        job = row.job
        if row.echo is not None:
            job.ticket.push(row.echo.event(job.request.ids))
        if not job.answers:
            self._leave(job)
            job.close()
            return []
        self.forest.store.copy(row.lane, row.spare)
        others = [ForestRow(job, row.prefill, lane, [], row.done) for lane in row.spare]
        row.spare = []
        self._rows += others
        found = []
        for each, answer in zip([row, *others], job.answers, strict=True):
            each.answer = answer
            each.lane.tainted = True
            found.append((each, answer))
        return found

    def _choose(self, ready: list[tuple[ForestRow, Answer]], logits: Tensor) -> None:
        """Give answers their next tokens from logits ``[R, V]``."""
        best, greedy = logits.max(-1)
        finite = torch.isfinite(best).tolist()
        tokens = [
            token if answer.is_plain or not sound else self._chosen(row, answer, own)
            for (row, answer), token, own, sound in zip(ready, greedy.tolist(), logits, finite, strict=True)
        ]
        scores = self._scores(ready, logits, tokens)
        for (row, answer), token, sound, score in zip(ready, tokens, finite, scores, strict=True):
            if row in self._rows:
                self._advance(row, answer, token if sound else None, score)

    def _chosen(self, row: ForestRow, answer: Answer, logits: Tensor) -> int:
        """Return an answer's next token; one whose options cannot be followed fails, and any token will do."""
        if row not in self._rows:  # another answer of its request failed just now
            return 0
        try:
            return answer.choose(logits)
        except Exception as cause:  # of a form, beyond the limits of its library
            self._leave(row.job)
            row.job.fail(cause)
            return 0

    def _advance(self, row: ForestRow, answer: Answer, token: int | None, score: Score) -> None:
        """Give an answer its next token; None when what the model gave is no number."""
        try:
            if token is None:
                raise not_finite()
            row.lane.tainted = False
            events = answer.add(token, *score)
        except Exception as cause:  # a decoder of the caller's may raise anything
            self._leave(row.job)
            row.job.fail(cause)
            return
        if answer.ended_by is not None:
            self._end(row)
        row.job.send(events)

    def _scores(self, ready: list[tuple[ForestRow, Answer]], logits: Tensor, tokens: list[int]) -> list[Score]:
        found: list[Score] = [(None, ())] * len(ready)
        wanting = [i for i, (_, answer) in enumerate(ready) if answer.request.logprobs is not None]
        if wanting:
            most = max(ready[i][1].request.logprobs or 0 for i in wanting)
            labels = [tokens[i] for i in wanting]
            own = scored(logits[torch.tensor(wanting, device=logits.device)], labels, most)
            for i, (logprob, top) in zip(wanting, own, strict=True):
                found[i] = (logprob, top[: ready[i][1].request.logprobs])
        return found

    def _end(self, row: ForestRow) -> None:
        self._rows.remove(row)
        for lane in (row.lane, *row.spare):
            self.forest.store.release(lane)

    def _leave(self, job: Job) -> None:
        for row in [each for each in self._rows if each.job is job]:
            self._end(row)


def _need(request: Request) -> int:
    """Return the tokens that a lane must hold; the last token of an answer is never fed."""
    return request.virtual_tokens + len(request.ids) + max(0, request.new_tokens - 1)
