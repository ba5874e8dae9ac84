"""Labels scored by how likely the model finds them as the answer.

score(x, k) = sum over the tokens of label k of log p(token | prompt, x, tokens before),
the label's tokens ending with the end token where the tokenizer has one. Normalised, the
sum is divided by the label's token count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.data import RowTokenizer
from softprompt.engine import Engine, EngineRow
from softprompt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LabelScores:
    """How likely each label is as the answer to one input.

    Attributes:
        label: The best label.
        scores: Log-probability of each label (per token when normalised), nats.
        probabilities: Softmax of the scores over the label set.
        input_cut: Whether the input was longer than the prompt's limit and lost its end.
    """

    label: str
    scores: Mapping[str, float]
    probabilities: Mapping[str, float]
    input_cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Question:
    """One input whose labels are to be scored.

    Attributes:
        source: Text tokens of the input.
        labels: Tokens of the K labels.
        prompt: Index of the prompt in it, -1 for none.
        at: Source tokens before that prompt.
        decoder_prompt: Index of the prompt before the answer of a seq2seq model, -1 for none.
    """

    source: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    prompt: int = 0
    at: int = 0
    decoder_prompt: int = -1


def label_set(given: Sequence[str] | None, own: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the labels to score: those that are given, or a prompt's own.

    Raises:
        ConfigError: One text is given, whose characters would be the labels.
    """
    if isinstance(given, str):
        raise ConfigError(
            f"labels expects a list of texts, got the text {given!r}; put it in a list"
        )
    chosen = own if given is None else given
    return None if chosen is None else tuple(chosen)


def label_ids_of(rows: RowTokenizer, labels: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the tokens of each label as an answer.

    Raises:
        ConfigError: There is no label, a label has no token, or two have the same tokens.
        DataError: A label is longer than answers may be.
    """
    found = [rows.label(label) for label in labels]
    check_label_ids(labels, found)
    return found


def label_scores(labels: Sequence[str], scores: Tensor, cut: Sequence[bool]) -> list[LabelScores]:
    """Return what scores ``[N, K]`` of K labels say of N inputs, and whether each lost its end."""
    shares = torch.softmax(scores, dim=1)
    return [
        LabelScores(
            label=labels[int(row.argmax())],
            scores=dict(zip(labels, row.tolist(), strict=True)),
            probabilities=dict(zip(labels, share.tolist(), strict=True)),
            input_cut=was_cut,
        )
        for row, share, was_cut in zip(scores, shares, cut, strict=True)
    ]


def check_label_ids(labels: Sequence[str], label_ids: Sequence[Sequence[int]]) -> None:
    """Check that labels can be told apart by their tokens.

    Raises:
        ConfigError: There is no label, a label has no token, or two have the same tokens.
    """
    if not labels:
        raise ConfigError("scoring expects at least one label, got none; pass labels")
    seen: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, label_ids, strict=True):
        if not ids:
            raise ConfigError(f"the label {label!r} has no tokens; give it another name")
        if tuple(ids) in seen:
            raise ConfigError(
                f"the labels {seen[tuple(ids)]!r} and {label!r} have the same tokens under this "
                "tokenizer; rename or drop one of them"
            )
        seen[tuple(ids)] = label


def score_labels(
    engine: Engine,
    prompts: Sequence[Tensor],
    sources: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    *,
    prompt_index: int = 0,
    decoder_index: int = -1,
    offsets: Sequence[int] | None = None,
    batch_size: int = 64,
    normalize: bool = False,
) -> Tensor:
    """Return how likely each label is for each source, without gradients.

    Args:
        engine: Scores targets after sources.
        prompts: Prompt rows ``[P, H]``, or nothing.
        sources: Text tokens of N inputs.
        label_ids: Tokens of K labels.
        prompt_index: Which prompt stands before every input; -1 is none.
        decoder_index: Which prompt stands before every answer of a seq2seq model; -1 is none.
        offsets: Source tokens before the prompt of each input; None puts every prompt in front.
        batch_size: (input, label) pairs in one pass; the labels of one input always stay together,
            because the forest engine then runs the input once.
        normalize: Divide each sum by the label's token count.

    Returns:
        float32 ``[N, K]`` in nats, on the CPU.
    """
    labels = tuple(tuple(ids) for ids in label_ids)
    questions = [
        Question(tuple(source), labels, prompt_index, at, decoder_index)
        for source, at in zip(sources, offsets or [0] * len(sources), strict=True)
    ]
    scores = score_questions(engine, prompts, questions, batch_size=batch_size)
    scores = scores.view(len(questions), len(labels))
    return per_token(scores, [len(ids) for ids in labels]) if normalize else scores


@torch.no_grad()
def score_questions(
    engine: Engine,
    prompts: Sequence[Tensor],
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
) -> Tensor:
    """Return how likely each label of each question is; see ``score_labels``.

    Questions of several prompts share passes: one forest holds the rows of all.

    Returns:
        float32 ``[N, K]`` in nats, on the CPU; all questions have K labels.

    Raises:
        ConfigError: ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size expects at least 1 row, got {batch_size}")
    count = len(questions[0].labels) if questions else 0
    # Sources of like length share a pass, so that a padded engine pads little; those of one prompt
    # do before that, because every pass runs each of its prompts once.
    order = sorted(range(len(questions)), key=lambda i: _neighbourhood(questions[i]))
    scores = torch.zeros(len(questions), count)
    inputs = max(1, batch_size // max(1, count))
    for start in range(0, len(order), inputs):
        chosen = order[start : start + inputs]
        rows = [
            EngineRow(each.source, label, each.prompt, each.at, each.decoder_prompt)
            for each in (questions[i] for i in chosen)
            for label in each.labels
        ]
        sums = engine.target_log_probs(rows, prompts).row_sums(len(rows))
        scores[chosen] = sums.float().cpu().view(len(chosen), count)
    return scores


def _neighbourhood(question: Question) -> tuple[int, int, int]:
    return question.prompt, question.decoder_prompt, len(question.source)


def per_token(scores: Tensor, label_tokens: Sequence[int]) -> Tensor:
    """Return scores ``[N, K]`` divided by each label's number of tokens."""
    return scores / torch.tensor(label_tokens, dtype=scores.dtype)
