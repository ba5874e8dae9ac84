"""Sampling and penalties of one answer, by transformers' logits processors where it has them.

transformers samples from the process-wide random state, and has no frequency and presence penalty.
Here each answer has a generator of its own, so an answer alone and the same answer in any batch sample
the same tokens. Processors get one row whose ids are its own: neither padding nor virtual tokens count.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from softprompt.generation.options import GenerationOptions


class GumbelNoise(LogitsProcessor):
    """Turns the argmax that follows into a sample from the softmax, by a seed of its own.

    Adding Gumbel noise and taking the maximum samples exactly from the softmax
    (Gumbel 1954; Maddison et al. 2014, "A* sampling"). The global random state is untouched.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[1, V]`` plus noise, float32."""
        noise = torch.empty(scores.shape).exponential_(generator=self._generator)
        # An exponential sample of exactly 0 would be infinite noise.
        noise = noise.clamp_min(torch.finfo(torch.float32).tiny)
        return scores.float() - noise.log().to(scores.device)


class CountPenalty(LogitsProcessor):
    """Frequency and presence penalty on the tokens behind the first ``skip``, as in OpenAI's API.

    A token's logit loses ``frequency`` for each occurrence, and ``presence`` once if it occurs.
    """

    def __init__(self, frequency: float, presence: float, skip: int = 0) -> None:
        self._frequency = frequency
        self._presence = presence
        self._skip = skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalised scores ``[B, V]``."""
        answers = input_ids[:, self._skip :]
        ones = torch.ones_like(answers, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add(1, answers, ones)
        return scores - self._frequency * counts - self._presence * (counts > 0)


def seeds_of(options: GenerationOptions, count: int) -> list[int | None]:
    """Return the seed of each of a request's ``count`` answers; None when nothing is sampled.

    Answer i has ``seed + i``; without a seed each gets a random one, so that it is repeatable.
    """
    if not options.samples:
        return [None] * count
    if options.seed is None:
        return [secrets.randbits(32) for _ in range(count)]
    return [(options.seed + i) % 2**63 for i in range(count)]


def processors_of(
    options: GenerationOptions, seed: int | None, end_ids: Collection[int], skip: int, form: Any = None
) -> LogitsProcessorList:
    """Return the processors of one answer, in the order in which transformers applies its own.

    ``skip`` ids stand before the answer, which the repetition penalty alone counts; ``seed`` None samples
    nothing, ``end_ids`` end an answer, and ``form`` masks what it may not go on with.
    """
    found = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.frequency_penalty or options.presence_penalty:
        found.append(CountPenalty(options.frequency_penalty, options.presence_penalty, skip))
    if options.exponential_decay_length_penalty is not None and end_ids:
        decay = options.exponential_decay_length_penalty
        found.append(ExponentialDecayLengthPenalty(decay, sorted(end_ids), skip))
    if form is not None:
        found.append(form)  # behind the penalties: a length penalty makes nan of -inf
    if seed is None:
        return found
    if options.temperature is not None:
        found.append(TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k is not None:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        found.append(TopPLogitsWarper(float(options.top_p)))
    if options.min_p is not None:
        found.append(MinPLogitsWarper(float(options.min_p)))
    if options.typical_p is not None and options.typical_p < 1.0:
        found.append(TypicalLogitsWarper(float(options.typical_p)))
    found.append(GumbelNoise(seed))
    return found
