"""Requests over the decode forest: who runs, what each pass runs, and what comes of it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone import facts_of
from softprompt.engine import DecodeForest, NewTokens
from softprompt.errors import ServingError
from softprompt.inference.continuous.answer import Answer
from softprompt.inference.continuous.bounds import Bounds
from softprompt.inference.continuous.checks import check_request
from softprompt.inference.continuous.events import Event, TopLogProbs
from softprompt.inference.continuous.job import Job
from softprompt.inference.continuous.request import Request
from softprompt.inference.continuous.residents import ResidentPrompts
from softprompt.inference.continuous.runner import Admission
from softprompt.inference.continuous.sequence import Echo, Reading, Sequence, not_finite, scored

Work = list[tuple[Sequence, NewTokens]]


@final
class ForestRunner:
    """Runs jobs in one decode forest; the thread that steps it owns it.

    Attributes:
        forest: The forest.
        residents: The prompts whose keys and values are kept.
    """

    name = "forest"

    def __init__(self, model: PreTrainedModel, bounds: Bounds) -> None:
        self.forest = DecodeForest(
            model, bounds.max_cached_tokens, ordered_weights=bounds.ordered_weights
        )
        self.residents = ResidentPrompts(bounds.max_prompts_resident, bounds.max_prompt_tokens)
        self._model = model
        self._facts = facts_of(model)
        self._bounds = bounds
        self._sequences: list[Sequence] = []

    @property
    def rows(self) -> int:
        """Answers that run or will: a lane each."""
        return sum(1 + len(each.spare) for each in self._sequences)

    @property
    def cached_tokens(self) -> int:
        """Tokens that there is memory for, whether or not rows use it now."""
        return self.forest.store.allocated

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run."""
        return list(dict.fromkeys(each.job for each in self._sequences))

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            SoftPromptError: As ``check_request``.
            ServingError: It does not fit into the bounds.
        """
        check_request(self._model, self._facts, request)
        need = _need(request)
        if request.n > self._bounds.max_batch_rows or not self.forest.store.fits(need, request.n):
            raise ServingError(
                f"n = {request.n} of up to {need:,} tokens do not fit into max_batch_rows "
                f"{self._bounds.max_batch_rows} and max_cached_tokens {self._bounds.max_cached_tokens:,}; "
                "ask for less or raise the bounds"
            )

    def admit(self, job: Job) -> Admission:
        """Start a job, unless there is no room, or another is just computing the same prompt."""
        request = job.request
        if self.rows + request.n > self._bounds.max_batch_rows:
            return "no room"
        reading = Reading.of(request, self._facts.vocabulary)
        if reading.key and any(s.keeps and s.reading.key == reading.key for s in self._sequences):
            return "later"
        lanes = self.forest.store.take(_need(request), request.n)
        if lanes is None:
            return "no room"
        sequence = Sequence(job, reading, lanes[0], lanes[1:])
        sequence.echo = Echo() if request.echo else None
        # Until its first logits are seen to be finite.
        sequence.lane.tainted = True
        self._sequences.append(sequence)
        self._fill(sequence)
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

    def _fill(self, sequence: Sequence) -> None:
        """Give a new row the keys and values of its prompt, if there are any yet."""
        key, prompt = sequence.reading.key, sequence.job.request.prompt
        if key is None or prompt is None:
            return
        kept = self.residents.find(key)
        if kept is None and prompt.prefix is not None:
            kept = self.forest.store.converted(prompt.prefix)
            self.residents.keep(key, kept)
        if kept is None:
            sequence.keeps = True
            return
        self.forest.store.fill(sequence.lane, kept)
        sequence.done = sequence.reading.kept_ids

    def _planned(self) -> Work:
        """Choose what a pass runs: a token of every answer, and inputs as far as the budget goes."""
        answering = [each for each in self._sequences if each.answer is not None]
        work = [(each, each.next_tokens(1)) for each in answering]
        budget = self._bounds.max_step_tokens - len(work)
        for each in self._sequences:
            if each.answer is None and budget > 0:
                work.append((each, each.next_tokens(budget)))
                budget -= len(work[-1][1].ids)
        return work

    def _one_by_one(self, work: Work) -> tuple[Work, list[Tensor]]:
        """Run rows alone, and fail those that cannot be run."""
        done: Work = []
        parts: list[Tensor] = []
        for sequence, new in work:
            if not any(sequence is each for each in self._sequences):
                continue
            try:
                parts += self.forest.step([new])
                done.append((sequence, new))
            except Exception as cause:  # as above
                error = ServingError(f"the model failed on this request: {cause}")
                error.__cause__ = cause
                self._leave(sequence.job)
                sequence.job.fail(error)
        kept = [i for i, (each, _) in enumerate(done) if each in self._sequences]
        return [done[i] for i in kept], [parts[i] for i in kept]

    def _use(self, work: Work, parts: list[Tensor]) -> None:
        """Note what was read, and give every answer its next token."""
        ready: list[tuple[Sequence, Answer]] = []
        rows: list[Tensor] = []
        for (sequence, new), logits in zip(work, parts, strict=True):
            if sequence.answer is None:
                sequence.read(len(new.ids), logits)
                self._keep(sequence)
                if sequence.is_reading:
                    continue
                ready += self._answering(sequence)
            else:
                ready.append((sequence, sequence.answer))
            rows += [logits[-1]] * (len(ready) - len(rows))
        if ready:
            self._choose(ready, torch.stack(rows))

    def _keep(self, sequence: Sequence) -> None:
        """Keep a prompt's keys and values as soon as they are there."""
        reading = sequence.reading
        if sequence.keeps and reading.key and sequence.done >= reading.kept_ids:
            self.residents.keep(
                reading.key, self.forest.store.read(sequence.lane, reading.kept_tokens)
            )
            sequence.keeps = False

    def _answering(self, sequence: Sequence) -> list[tuple[Sequence, Answer]]:
        """Return the answers that begin behind an input, each with a row of its own."""
        job = sequence.job
        if sequence.echo is not None:
            job.ticket.push(sequence.echo.event(job.request.ids))
        if not job.answers:
            self._leave(job)
            job.close()
            return []
        self.forest.store.copy(sequence.lane, sequence.spare)
        others = [
            Sequence(job, sequence.reading, lane, [], sequence.done) for lane in sequence.spare
        ]
        sequence.spare = []
        self._sequences += others
        found = []
        for each, answer in zip([sequence, *others], job.answers, strict=True):
            each.answer = answer
            each.lane.tainted = True
            found.append((each, answer))
        return found

    def _choose(self, ready: list[tuple[Sequence, Answer]], logits: Tensor) -> None:
        """Give answers their next tokens from logits ``[R, V]``."""
        best, likeliest = logits.max(-1)
        finite = torch.isfinite(best).tolist()
        tokens = [
            int(token) if answer.is_plain or not sound else answer.choose(row)
            for (_, answer), token, row, sound in zip(
                ready, likeliest.tolist(), logits, finite, strict=True
            )
        ]
        scores = self._scores(ready, logits, tokens)
        for (sequence, answer), token, sound, score in zip(
            ready, tokens, finite, scores, strict=True
        ):
            if sequence in self._sequences:
                self._advance(sequence, answer, token if sound else None, score)

    def _advance(
        self,
        sequence: Sequence,
        answer: Answer,
        token: int | None,
        score: tuple[float | None, TopLogProbs],
    ) -> None:
        """Give an answer its next token; None when what the model gave is no number."""
        try:
            if token is None:
                raise not_finite()
            sequence.lane.tainted = False
            events: list[Event] = [answer.add(token, *score)]
        except Exception as cause:  # a decoder of the caller's may raise anything
            self._leave(sequence.job)
            sequence.job.fail(cause)
            return
        if answer.ended_by is not None:
            events.append(answer.finish())
            self._end(sequence)
        sequence.job.tell(events)

    def _scores(
        self, ready: list[tuple[Sequence, Answer]], logits: Tensor, tokens: list[int]
    ) -> list[tuple[float | None, TopLogProbs]]:
        found: list[tuple[float | None, TopLogProbs]] = [(None, ())] * len(ready)
        wanting = [i for i, (_, answer) in enumerate(ready) if answer.request.logprobs is not None]
        if wanting:
            most = max(ready[i][1].request.logprobs or 0 for i in wanting)
            labels = [tokens[i] for i in wanting]
            own = scored(logits[torch.tensor(wanting, device=logits.device)], labels, most)
            for i, (logprob, top) in zip(wanting, own, strict=True):
                found[i] = (logprob, top[: ready[i][1].request.logprobs])
        return found

    def _end(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        for lane in (sequence.lane, *sequence.spare):
            self.forest.store.release(lane)

    def _leave(self, job: Job) -> None:
        for sequence in [each for each in self._sequences if each.job is job]:
            self._end(sequence)


def _need(request: Request) -> int:
    """Return the tokens that a lane must hold; the last token of an answer is never fed."""
    return request.virtual_tokens + len(request.ids) + max(0, request.new_tokens - 1)
