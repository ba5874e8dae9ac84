"""Requests in batches of the model's own ``generate``, for models the decode forest declines.

A batch runs to its end before the next begins. Rows choose and end by their own options, each as
it would alone, and their events come with every step.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from softprompt.backbone import facts_of, output_limit
from softprompt.engine import PlainEngine, build_engine, prefix_path
from softprompt.errors import DataError, ServingError
from softprompt.inference.continuous.answer import Answer
from softprompt.inference.continuous.bounds import Bounds
from softprompt.inference.continuous.checks import check_request
from softprompt.inference.continuous.events import Event
from softprompt.inference.continuous.job import Job
from softprompt.inference.continuous.prompted import generate_prompted, input_logits
from softprompt.inference.continuous.request import Request
from softprompt.inference.continuous.residents import ResidentPrompts
from softprompt.inference.continuous.runner import Admission
from softprompt.inference.continuous.sequence import Echo, not_finite, scored
from softprompt.inference.generation import Generator
from softprompt.inference.options import GenerationOptions


@final
class SimpleRunner:
    """Runs jobs batch after batch, each to its end.

    Attributes:
        residents: Always empty: nothing is kept between batches.
    """

    name = "simple"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bounds: Bounds
    ) -> None:
        self.residents = ResidentPrompts(0, 0)
        self._model = model
        self._facts = facts_of(model)
        self._bounds = bounds
        self._generator = Generator.of(model, tokenizer, lambda ids: "")
        self._jobs: list[Job] = []
        # Padding, or the longest row of a batch, may change the rows beside it.
        self._alone = self._facts.rope_changes_at is not None or bool(
            PlainEngine(model).why_alone()
        )

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run."""
        return list(self._jobs)

    @property
    def rows(self) -> int:
        """Answers that run or will."""
        return sum(job.request.n for job in self._jobs)

    @property
    def cached_tokens(self) -> int:
        """Tokens that there is memory for, whether or not rows use it now."""
        return sum(_need(job.request) * job.request.n for job in self._jobs)

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            SoftPromptError: As ``check_request``.
            DataError: It has no input.
            ServingError: It does not fit into the bounds.
        """
        if not request.ids:
            raise DataError(
                "the input has no tokens, there is nothing for the model to read; give it text"
            )
        check_request(self._model, self._facts, request)
        need = _need(request) * request.n
        if request.n > self._bounds.max_batch_rows or need > self._bounds.max_cached_tokens:
            raise ServingError(
                f"n = {request.n} of up to {_need(request):,} tokens do not fit into max_batch_rows "
                f"{self._bounds.max_batch_rows} and max_cached_tokens {self._bounds.max_cached_tokens:,}; "
                "ask for less or raise the bounds"
            )

    def admit(self, job: Job) -> Admission:
        """Put a job into the next batch, unless it does not fit into it."""
        if self._jobs and not self._fit([*self._jobs, job]):
            return "later"  # the first that waits begins the next batch
        self._jobs.append(job)
        return "started"

    def step(self) -> None:
        """Run the batch to its end."""
        try:
            self._run(self._jobs)
        except Exception as cause:  # whatever a model's own code raises: find the row it is about
            if any(answer.tokens for job in self._jobs for answer in job.answers):
                self._fail(self._jobs, cause)
            else:
                self._one_by_one()
        self._jobs = []

    def _one_by_one(self) -> None:
        for job in self._jobs:
            try:
                self._run([job])
            except Exception as cause:  # as above
                self._fail([job], cause)

    def _fail(self, jobs: list[Job], cause: Exception) -> None:
        error = ServingError(f"the model failed on this request: {cause}")
        error.__cause__ = cause
        for job in jobs:
            job.fail(error)

    def _fit(self, jobs: list[Job]) -> bool:
        """Tell whether jobs can be one batch, padded to its longest row."""
        requests = [job.request for job in jobs]
        rows = sum(request.n for request in requests)
        text = max(len(request.ids) for request in requests)
        virtual = max(request.virtual_tokens for request in requests)
        new = max(request.new_tokens for request in requests)
        limit = self._facts.context_length
        if self._facts.is_encoder_decoder:
            decoder = output_limit(self._model)
            limits = (limit is None or text + virtual <= limit) and (
                decoder is None or virtual + new <= decoder
            )
        else:
            limits = limit is None or text + virtual + new <= limit
        return (
            limits
            and rows <= self._bounds.max_batch_rows
            and rows * (text + virtual + new) <= self._bounds.max_cached_tokens
            and len({_kind(request) for request in requests}) == 1
            and not self._must_be_alone(requests)
        )

    def _must_be_alone(self, requests: list[Request]) -> bool:
        if self._alone:
            return True
        return _kind(requests[0])[0] and prefix_path(self._model, self._facts).counts_columns

    def _run(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.request.echo and not job.is_over:
                self._echo(job)
        rows = [
            (job, answer)
            for job in jobs
            for answer in job.answers
            if not (job.is_over or job.ticket.is_done)
        ]
        if rows:
            self._generate(rows)
        for job in jobs:
            job.close()

    def _generate(self, rows: list[tuple[Job, Answer]]) -> None:
        ids, mask = self._generator.padded([job.request.ids for job, _ in rows])
        most = max(answer.request.options.max_new_tokens for _, answer in rows)
        kwargs: dict[str, Any] = {
            **self._generator.settings(GenerationOptions(max_new_tokens=most)),
            "input_ids": ids,
            "attention_mask": mask,
            "logits_processor": LogitsProcessorList([_OwnChoices(rows)]),
            "stopping_criteria": StoppingCriteriaList([_OwnEnds(rows)]),
        }
        requests = [job.request for job, _ in rows]
        generate_prompted(self._model, self._facts, requests, kwargs)

    def _echo(self, job: Job) -> None:
        request, echo = job.request, Echo()
        logits = input_logits(build_engine(self._model), request)
        echo.add(logits, request.ids[1:], request.logprobs or 0)
        job.ticket.push(echo.event(request.ids))


class _OwnChoices(LogitsProcessor):
    """Gives every row the token that its own options choose, and tells of it."""

    def __init__(self, rows: list[tuple[Job, Answer]]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[B, V]`` under which the greedy choice is each row's own."""
        chosen = scores.argmax(-1)
        for i, (job, answer) in enumerate(self._rows):
            if job.is_over:
                job.close()
            if answer.ended_by is None and not job.ticket.is_done:
                chosen[i] = self._advance(job, answer, scores[i].float())
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)

    def _advance(self, job: Job, answer: Answer, logits: Tensor) -> int:
        try:
            if not bool(torch.isfinite(logits.max())):
                raise not_finite()
            token = answer.choose(logits)
            events: list[Event] = []
            count = answer.request.logprobs
            if count is None:
                events.append(answer.add(token, None, ()))
            else:
                events.append(answer.add(token, *scored(logits.unsqueeze(0), [token], count)[0]))
        except Exception as cause:  # a decoder of the caller's may raise anything
            job.fail(cause)
            return 0
        if answer.ended_by is not None:
            events.append(answer.finish())
        job.tell(events)
        return token


class _OwnEnds(StoppingCriteria):
    """Ends every row where its own options end it."""

    def __init__(self, rows: list[tuple[Job, Answer]]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return ``[B]`` booleans, True where the row is done."""
        done = [answer.ended_by is not None or job.ticket.is_done for job, answer in self._rows]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _kind(request: Request) -> tuple[bool, bool]:
    """Return what all prompts of a batch must share: prefix or virtual tokens, and what they see."""
    prompt = request.prompt
    return (False, True) if prompt is None else (prompt.prefix is not None, prompt.sees_input)


def _need(request: Request) -> int:
    return len(request.ids) + request.virtual_tokens + request.new_tokens
