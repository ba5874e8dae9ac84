"""Beam search, by transformers' own ``generate``: whole batches, whose answers have their text at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from softprompt.generation.answer import Answer, Job, StopSequences
from softprompt.generation.fallback_runner import PaddedGenerate


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
        stopping_criteria=StoppingCriteriaList(
            [StopTexts(answers[0].stops)] if options.stop_sequences else []
        ),
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
