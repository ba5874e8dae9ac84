"""Several prompts of one base that answer together, in one pass over the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, final, get_args, overload

import torch
from torch import Tensor

from softprompt.engine import Engine, EngineRow, sees_input_of
from softprompt.errors import ConfigError, FingerprintError, nearest
from softprompt.generation import LabelScores, label_rows, label_scores, per_token, rows_of_whole_inputs, score_rows
from softprompt.inference.inputs import Fields, Task, is_single
from softprompt.inference.tuned import TunedPrompt

Combine = Literal["mean", "vote"]

COMBINES: tuple[Combine, ...] = get_args(Combine)


@dataclass(frozen=True, slots=True)
class Combined:
    """What an ensemble answers for N inputs.

    Attributes:
        predicted: Index of the answer for each input.
        scores: Mean over the members of each label's log-probability ``[N, K]``, nats.
        shares: ``[N, K]``, summing to 1: under "mean" the softmax of the scores, under "vote" the
            share of the members that chose the label.
    """

    predicted: tuple[int, ...]
    scores: Tensor
    shares: Tensor


@final
class Ensemble:
    """Prompts of one base and one label set as one classifier (Lester et al. 2021, section 6).

    The members' templates may differ. Under "mean" the answer is the label of the highest
    log-probability on average; under "vote" it is the label most members choose, and of those that
    get equally many votes the one that is higher on average.

    ``labels`` is the label set, in the order of the first member.
    """

    def __init__(
        self,
        members: Sequence[TunedPrompt],
        *,
        combine: Combine = "mean",
        names: Sequence[str] | None = None,
        task: Task | None = None,
    ) -> None:
        """Check that the members can answer together; nothing is copied.

        Args:
            members: Two prompts or more; their models may be one or equal ones, the first's is run.
            combine: How the members' answers are combined.
            names: One name for each member; None numbers them from 1.
            task: The task of the members that have several, by name or number.

        Raises:
            ConfigError: There are too few members, their label sets differ, a member has several
                tasks and none is chosen, or a setting is wrong.
            FingerprintError: The members are of different bases.
        """
        if combine not in COMBINES:
            raise ConfigError(
                f"combine is one of {', '.join(COMBINES)}, got {combine!r}{nearest(str(combine), COMBINES)}"
            )
        self.members = _of_task(members, task)
        self.names = tuple(names or map(str, range(1, len(self.members) + 1)))
        if len(self.members) < 2 or len(set(self.names)) != len(self.members):
            raise ConfigError(
                f"an ensemble needs two prompts or more, each with a name of its own, got "
                f"{len(self.members)} named {', '.join(self.names) or 'nothing'}"
            )
        self.combine = combine
        self.labels = self._shared_labels()
        self._check_bases()

    def of_task(self, task: Task | None) -> Ensemble:
        """Return this ensemble with its multitask members as used for one task.

        Raises:
            ConfigError: A member has no such task, or no member has several.
        """
        if task is None:
            return self
        return Ensemble(self.members, combine=self.combine, names=self.names, task=task)

    # A str is iterable too; the first overload is the one meant.
    @overload
    def __call__(self, requests: Fields) -> str: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, requests: Iterable[Fields]) -> list[str]: ...

    def __call__(self, requests: Fields | Iterable[Fields]) -> str | list[str]:
        """Return the best label of one input, or of each in a list; see ``classify``."""
        answers = [each.label for each in self.classify(requests)]
        return answers[0] if is_single(requests) else answers

    def classify(
        self, requests: Fields | Iterable[Fields], *, normalize: bool = False, batch_size: int = 64
    ) -> list[LabelScores]:
        """Return the ensemble's answer to each input; ``scores`` are means over the members.

        Args:
            requests: One input or several: texts, or mappings of the templates' fields.
            normalize: Divide a label's log-probability by its token count.
            batch_size: (member, input, label) triples in one pass, at most.

        Raises:
            TemplateError: An input does not have the fields of a member's template.
            ContextOverflowError: Prompt, input and label exceed the model's context.
        """
        given = requests if is_single(requests) else list(requests)
        found = [member.sources(given) for member in self.members]
        scores = self.scores([sources for sources, _ in found], batch_size=batch_size)
        answer = self.combined(self.ranked(scores) if normalize else scores)
        cut = [any(lost) for lost in zip(*(cuts for _, cuts in found), strict=True)]
        return label_scores(self.labels, answer.scores, cut, shares=answer.shares, best=answer.predicted)

    def scores(
        self, sources: Sequence[Sequence[Sequence[int]]], *, engine: Engine | None = None, batch_size: int = 64
    ) -> Tensor:
        """Return the log-probability of each label under each member, ``[M, N, K]`` in nats.

        ``sources`` are for each of the M members the text tokens of the same N inputs; ``batch_size``
        (member, input, label) triples go into one pass of the engine, at most.
        """
        first = self.members[0]
        rows = []
        for member, labels, inputs in zip(self.members, self.label_ids(), sources, strict=True):
            prompt = member.prompt().to(first.base.device)
            for source in inputs:
                rows += label_rows(source, labels, prompt, member.rows.offset(source))
        size = rows_of_whole_inputs(batch_size, len(self.labels))
        engine, count = engine or first.engine, len(self.labels)
        inputs_of_rows = [rows[start : start + count] for start in range(0, len(rows), count)]

        def scored(own: Sequence[Sequence[EngineRow]]) -> Sequence[Tensor]:
            return tuple(score_rows(engine, list(chain(*own)), max_rows=size).view(-1, count))

        return torch.stack(engine.processes.split(inputs_of_rows, scored)).view(len(self.members), -1, count)

    def combined(self, scores: Tensor) -> Combined:
        """Combine the members' scores ``[M, N, K]``."""
        mean = scores.mean(dim=0)
        if self.combine == "mean":
            return Combined(_best(mean), mean, torch.softmax(mean, dim=1))
        chosen = torch.nn.functional.one_hot(scores.argmax(dim=2), scores.shape[2])
        votes = chosen.sum(dim=0)
        most = votes == votes.max(dim=1, keepdim=True).values
        return Combined(_best(mean.masked_fill(~most, -torch.inf)), mean, votes.float() / len(scores))

    def ranked(self, scores: Tensor) -> Tensor:
        """Return scores ``[M, N, K]`` divided by the tokens of each label under each member."""
        parts = zip(scores, self.label_ids(), strict=True)
        return torch.stack([per_token(own, [len(ids) for ids in labels]) for own, labels in parts])

    def label_ids(self) -> list[tuple[tuple[int, ...], ...]]:
        """Return each member's tokens of the labels; raise ``ConfigError`` where two have the same."""
        return [tuple(member.label_ids(self.labels)) for member in self.members]

    def _shared_labels(self) -> tuple[str, ...]:
        for name, member in zip(self.names, self.members, strict=True):
            if not member.labels:
                raise ConfigError(f"an ensemble scores labels, and prompt {name} generates free text; leave it out")
        first = self.members[0].labels or ()
        for name, member in zip(self.names, self.members, strict=True):
            odd = set(member.labels or ()) ^ set(first)
            if odd:
                raise ConfigError(
                    f"the members of an ensemble share one label set; prompts {self.names[0]} and {name} "
                    f"differ in {', '.join(map(repr, sorted(odd)))}"
                )
        return first

    def _check_bases(self) -> None:
        first = self.members[0]
        for name, member in zip(self.names[1:], self.members[1:], strict=True):
            other = member.base
            alike = other.model is first.base.model
            reason = None if alike else first.base.fingerprint.differs(other.fingerprint)
            if reason is not None:
                raise FingerprintError(
                    f"the members of an ensemble share one base, prompts {self.names[0]} and {name} do not: "
                    f"{first.base.name} and {other.name} are different models ({reason}); use prompts of one base"
                )
            if sees_input_of(member.config) != sees_input_of(first.config):
                raise ConfigError(
                    "the members of an ensemble share prompt_sees_input, prompts "
                    f"{self.names[0]} and {name} differ in it; evaluate them by themselves"
                )


def _of_task(members: Sequence[TunedPrompt], task: Task | None) -> tuple[TunedPrompt, ...]:
    """Return members, those with several tasks as used for one."""
    several = [each.module.num_tasks > 1 for each in members]
    if task is not None and not any(several):
        raise ConfigError(
            f"the task {task!r} would be ignored, as no member of the ensemble has several; leave it out"
        )
    pairs = zip(members, several, strict=True)
    return tuple(each.of_task(task) if choose else each for each, choose in pairs)


def _best(scores: Tensor) -> tuple[int, ...]:
    return tuple(scores.argmax(dim=1).tolist())
