"""Requests through transformers' own ``generate``: for models without a decode forest, and beam search.

A batch runs to its end before the next begins. Rows choose and end by their own options, each as
it would alone, and their events are sent with every step. Only the special tokens are taken from the
base's generation settings; search settings come from ``GenerationOptions`` alone, so that a base with
beams or n-gram bans in its own does not change the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from softprompt.backbone import Base, output_limit
from softprompt.engine import (
    Engine,
    EngineRow,
    PlainEngine,
    ResidentPrompts,
    build_engine,
    generate_with_prompts,
    prefix_path,
)
from softprompt.errors import DataError
from softprompt.generation.answer import (
    Admission,
    Answer,
    AnswerRules,
    Echo,
    Job,
    StopSequences,
    model_failed,
    not_finite,
    scored,
)
from softprompt.generation.options import Bounds
from softprompt.generation.request import Request, beyond_bounds, check_request

_SETTINGS: dict[str, Any] = {
    # Sampling and penalties are the processors' work.
    "do_sample": False,
    "num_beams": 1,
    "max_time": None,
    "repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "min_length": None,
    "min_new_tokens": None,
    "forced_eos_token_id": None,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}


@final
class PaddedGenerate:
    """``generate`` over a padded batch of requests, each row behind its prompt.

    Attributes:
        pad_id: What fills short rows; masked, so any id of the vocabulary serves.
    """

    def __init__(self, base: Base, bounds: Bounds, eos_ids: frozenset[int]) -> None:
        self._base = base
        self._bounds = bounds
        self._eos_ids = eos_ids
        # A tokenizer may have more ids than the model has embeddings.
        known = range(base.embedding.weight.shape[0])
        candidates = (base.tokenizer.pad_token_id, base.tokenizer.eos_token_id, 0)
        self.pad_id = next(each for each in candidates if each in known)
        # Padding, or the longest row of a batch, may change the rows beside it.
        self._alone = base.facts.rope_changes_at is not None or bool(PlainEngine(base).why_alone())

    def __call__(self, requests: Sequence[Request], **settings: Any) -> Tensor:
        """Return new tokens ``[B, k]``, padded behind each row's end; ``settings`` are ``generate``'s."""
        ids, mask = self._padded([request.ids for request in requests])
        kwargs = {
            **_SETTINGS,
            "max_new_tokens": max(request.new_tokens for request in requests),
            "pad_token_id": self.pad_id,
            "input_ids": ids,
            "attention_mask": mask,
            **({"eos_token_id": sorted(self._eos_ids)} if self._eos_ids else {}),
            **settings,
        }
        at = [request.at for request in requests]
        prompts = [request.prompt for request in requests]
        found: Tensor = generate_with_prompts(self._base, prompts, kwargs, at=at if any(at) else None)
        return found[:, 1 if self._base.is_encoder_decoder else ids.shape[1] :]

    def fits(self, requests: Sequence[Request]) -> bool:
        """Return whether requests fit into one batch, padded to its longest row."""
        rows = sum(request.n for request in requests)
        text = max(len(request.ids) for request in requests)
        virtual = max(request.virtual_tokens for request in requests)
        new = max(request.new_tokens for request in requests)
        limit = self._base.facts.context_length
        if self._base.is_encoder_decoder:
            decoder = output_limit(self._base.model)
            limits = (limit is None or text + virtual <= limit) and (decoder is None or virtual + new <= decoder)
        else:
            limits = limit is None or text + virtual + new <= limit
        return (
            limits
            and rows <= self._bounds.max_batch_rows
            and rows * (text + virtual + new) <= self._bounds.max_cached_tokens
            and len({_kind(request) for request in requests}) == 1
            and not self._alone
            # Where columns count as positions, padding would move what stands behind a prefix.
            and not (_kind(requests[0])[0] and prefix_path(self._base).counts_columns)
        )

    def _padded(self, sources: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Return rows of ids ``[B, T]`` filled up to the longest, and their mask."""
        width = max(len(source) for source in sources)
        ids = torch.full((len(sources), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, source in enumerate(sources):
            # A decoder goes on after its last column; an encoder counts columns as positions.
            start = 0 if self._base.is_encoder_decoder else width - len(source)
            ids[index, start : start + len(source)] = torch.tensor(source, dtype=torch.long)
            mask[index, start : start + len(source)] = 1
        return ids.to(self._base.device), mask.to(self._base.device)


@final
class FallbackRunner:
    """Static batching: runs jobs batch after batch, each to its end; keeps no prompts between batches."""

    name = "simple"

    def __init__(self, base: Base, bounds: Bounds, rules: AnswerRules) -> None:
        self.residents = ResidentPrompts(0, 0)
        self._base = base
        self._bounds = bounds
        self._generate = PaddedGenerate(base, bounds, rules.eos_ids)
        self.jobs: list[Job] = []

    @property
    def rows(self) -> int:
        """Answers that run or will."""
        return sum(job.request.n for job in self.jobs)

    @property
    def cached_tokens(self) -> int:
        """Tokens that there is memory for, whether or not rows use it now."""
        return sum(_need(job.request) * job.request.n for job in self.jobs)

    def check(self, request: Request) -> None:
        """Refuse a request that could never run: as ``check_request``, without input, or beyond the bounds."""
        if not request.ids:
            raise DataError("the input has no tokens, there is nothing for the model to read; give it text")
        check_request(self._base, request)
        need, bounds = _need(request), self._bounds
        if request.n > bounds.max_batch_rows or need * request.n > bounds.max_cached_tokens:
            raise beyond_bounds(request, need, bounds)

    def admit(self, job: Job) -> Admission:
        """Put a job into the next batch, unless it does not fit into it."""
        requests = [each.request for each in (*self.jobs, job)]
        if self.jobs and not self._generate.fits(requests):
            return "later"  # the first that waits begins the next batch
        self.jobs.append(job)
        return "started"

    def step(self) -> None:
        """Run the batch to its end."""
        self._run_or_fail(self.jobs)
        self.jobs = []

    def _run_or_fail(self, jobs: list[Job]) -> None:
        try:
            self._run(jobs)
        except Exception as cause:  # whatever a model's own code raises: find the row it is about
            if len(jobs) == 1 or any(answer.tokens for job in jobs for answer in job.answers):
                for job in jobs:
                    job.fail(model_failed(cause))
            else:
                for job in jobs:
                    self._run_or_fail([job])

    def _run(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.request.echo and not job.is_over:
                self._echo(job)
        rows = [(job, answer) for job in jobs for answer in job.answers if not (job.is_over or job.ticket.is_done)]
        if rows:
            self._generate(
                [answer.request for _, answer in rows],
                logits_processor=LogitsProcessorList([_OwnChoices(rows)]),
                stopping_criteria=StoppingCriteriaList([_OwnEnds(rows)]),
            )
        for job in jobs:
            job.close()

    def _echo(self, job: Job) -> None:
        request, echo = job.request, Echo()
        logits = _input_logits(build_engine(self._base), request)
        echo.add(logits, request.ids[1:], request.logprobs or 0)
        job.ticket.push(echo.event(request.ids))


class _OwnChoices(LogitsProcessor):
    """Gives every row the token that its own options choose, and sends its event."""

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
            count = answer.request.logprobs
            score = () if count is None else scored(logits.unsqueeze(0), [token], count)[0]
            events = answer.add(token, *score)
        except Exception as cause:  # a decoder of the caller's may raise anything
            job.fail(cause)
            return 0
        job.send(events)
        return token


class _OwnEnds(StoppingCriteria):
    """Ends every row where its own options end it."""

    def __init__(self, rows: list[tuple[Job, Answer]]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return ``[B]`` booleans, True where the row is done."""
        done = [answer.ended_by is not None or job.ticket.is_done for job, answer in self._rows]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def _input_logits(engine: Engine, request: Request) -> Tensor:
    """Return the logits ``[T - 1, V]`` that predict a request's input tokens, but the first."""
    ids, at = request.ids, request.at
    before = at if request.prompt is not None else 0
    parts = []
    if before > 1:  # tokens in front of the prompt do not see it
        parts.append(engine.target_outputs([EngineRow(ids[:1], ids[1:before])]).logits)
    first = max(1, before)
    if first < len(ids):
        row = EngineRow(ids[:first], ids[first:], request.prompt, before)
        parts.append(engine.target_outputs([row]).logits)
    return torch.cat(parts) if parts else torch.empty(0, 1)


def _kind(request: Request) -> tuple[bool, bool]:
    """Return what all prompts of a batch must share: prefix or virtual tokens, and what they see."""
    prompt = request.prompt
    return (False, True) if prompt is None else (prompt.prefix is not None, prompt.sees_input)


def _need(request: Request) -> int:
    return len(request.ids) + request.virtual_tokens + request.new_tokens


@torch.no_grad()
def beam_search(generate: PaddedGenerate, jobs: Sequence[Job]) -> None:
    """Answer the jobs, which have one set of options and fit into one batch, and send their ends."""
    answers = [answer for job in jobs for answer in job.answers]
    options = answers[0].request.options
    processors = [] if all(answer.is_plain for answer in answers) else [_EachRow(answers)]
    rows = generate(
        [answer.request for answer in answers],
        num_beams=options.num_beams,
        max_time=options.max_time,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([StopTexts(answers[0].stops)] if options.stop_sequences else []),
    )
    # The best beam of a row, with the padding behind its end; taken token by token it ends where it did.
    for answer, row in zip(answers, rows.tolist(), strict=True):
        for token in row:
            answer.add(token)
            if answer.ended_by is not None:
                break
    for job in jobs:
        job.close()


@final
class _EachRow(LogitsProcessor):
    """Runs the processors of each answer on the beams of its row alone."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the processed scores ``[B * beams, V]``."""
        if self._start is None:
            self._start = input_ids.shape[1]
        count = len(self._answers)
        tokens = input_ids[:, self._start :].chunk(count)
        parts = zip(self._answers, tokens, scores.chunk(count), strict=True)
        return torch.cat([answer.processed(*part) for answer, *part in parts])


@final
class StopTexts(StoppingCriteria):
    """Ends a beam when it completes a stop sequence."""

    def __init__(self, stops: StopSequences) -> None:
        self._stops = stops
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return ``[B * beams]`` booleans, True where the beam is done."""
        if self._start is None:
            # The first call comes after the first new token, whatever stands before it.
            self._start = input_ids.shape[1] - 1
        answers = input_ids[:, self._start :].tolist()
        done = [self._stops.completed_by_last(answer) is not None for answer in answers]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
