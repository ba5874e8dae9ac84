"""Logits processors that know which tokens belong to which row.

transformers draws from the process-wide random state and penalises pad tokens like text,
so an answer there depends on the rows it shares a batch with. Here every row has a
generator of its own and its own list of tokens: a row alone and the same row in any batch
get the same draws and the same penalty.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from softprompt.inference.options import GenerationOptions


class RowSampler(LogitsProcessor):
    """Turns the greedy choice that follows into a draw from the softmax, one seed per row.

    Adding Gumbel noise and taking the maximum draws exactly from the softmax
    (Gumbel 1954; Maddison et al. 2014, "A* sampling"). The global random state is untouched.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[B, V]`` plus each row's own noise, float32."""
        rows = [
            torch.empty(scores.shape[-1]).exponential_(generator=each) for each in self._generators
        ]
        # An exponential draw of exactly 0 would be infinite noise.
        waits = torch.stack(rows).clamp_min(torch.finfo(torch.float32).tiny)
        return scores.float() - waits.log().to(scores.device)


class RowRepetitionPenalty(LogitsProcessor):
    """Makes the tokens of a row's own text less likely (CTRL, Keskar et al. 2019).

    Args:
        penalty: Positive logits are divided by it, negative ones multiplied.
        texts: Input tokens that count for each row; pads and virtual tokens are not among them.
        beams: Consecutive rows of scores that belong to one row of text.
    """

    def __init__(self, penalty: float, texts: Sequence[Sequence[int]], beams: int) -> None:
        self._penalty = penalty
        self._texts = texts
        self._beams = beams
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalised scores ``[B, V]``."""
        if self._start is None:
            self._start = input_ids.shape[1]
        answers = input_ids[:, self._start :]
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for index in range(scores.shape[0]):
            text = torch.tensor(self._texts[index // self._beams], dtype=torch.long)
            seen[index, text.to(scores.device)] = True
            seen[index, answers[index]] = True
        penalised = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
        return torch.where(seen, penalised, scores)


class RowCountPenalty(LogitsProcessor):
    """Takes from a token's logit by how often it is in its row's own answer, as OpenAI's API does.

    Args:
        frequency: Taken for each time.
        presence: Taken once.
    """

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency = frequency
        self._presence = presence
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalised scores ``[B, V]``."""
        if self._start is None:
            self._start = input_ids.shape[1]
        answers = input_ids[:, self._start :]
        ones = torch.ones_like(answers, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add(1, answers, ones)
        return scores - self._frequency * counts - self._presence * (counts > 0)


class RowLengthPenalty(LogitsProcessor):
    """Makes the end of a row likelier with each token behind the first ``start`` of its answer.

    What is added to an end token's logit l behind k tokens more is ``|l| (factor^k - 1)``, as caikit's
    and transformers' ``exponential_decay_length_penalty`` have it.

    Args:
        start: Tokens of an answer that are free.
        factor: Above 1 the end gets likelier, below 1 less likely.
        end_ids: Tokens that end an answer.
    """

    def __init__(self, start: int, factor: float, end_ids: Collection[int]) -> None:
        self._free = start
        self._factor = factor
        self._end_ids = sorted(end_ids)
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores ``[B, V]`` with those of end tokens changed."""
        if self._start is None:
            self._start = input_ids.shape[1]
        more = input_ids.shape[1] - self._start - self._free
        if more <= 0 or not self._end_ids:
            return scores
        ends = scores[:, self._end_ids]
        # An end that is not allowed yet stays so.
        pulled = torch.where(ends.isinf(), ends, ends + ends.abs() * (self._factor**more - 1))
        changed = scores.clone()
        changed[:, self._end_ids] = pulled
        return changed


def row_seeds(options: GenerationOptions, count: int) -> list[int | None]:
    """Return the seed of each of ``count`` answers: the one asked for, drawn ones, or None.

    A seed that was asked for is every row's, so that each answer can be had again alone.
    """
    if not options.samples:
        return [None] * count
    if options.seed is not None:
        return [options.seed] * count
    return [secrets.randbits(32) for _ in range(count)]


def row_processors(
    options: GenerationOptions,
    texts: Sequence[Sequence[int]],
    seeds: Sequence[int | None],
    end_ids: Collection[int],
) -> LogitsProcessorList:
    """Return the processors of one batch, in the order in which transformers applies its own.

    Args:
        options: Checked generation options.
        texts: Tokens of each row that the repetition penalty counts besides the answer's.
        seeds: One seed for each row when the options sample.
        end_ids: Tokens that end an answer.
    """
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        processors.append(
            RowRepetitionPenalty(options.repetition_penalty, texts, options.num_beams)
        )
    if options.frequency_penalty or options.presence_penalty:
        processors.append(RowCountPenalty(options.frequency_penalty, options.presence_penalty))
    if options.exponential_decay_length_penalty is not None:
        processors.append(RowLengthPenalty(*options.exponential_decay_length_penalty, end_ids))
    if not options.samples:
        return processors
    if options.temperature is not None:
        processors.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k is not None:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        processors.append(TopPLogitsWarper(float(options.top_p)))
    if options.min_p is not None:
        processors.append(MinPLogitsWarper(float(options.min_p)))
    if options.typical_p is not None and options.typical_p < 1.0:
        processors.append(TypicalLogitsWarper(float(options.typical_p)))
    processors.append(RowSampler([seed for seed in seeds if seed is not None]))
    return processors
