"""What was found of a prompt, section by section; and of what was not, why. Numbers, and a text of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, final

from softprompt.errors import SoftPromptError
from softprompt.evaluation import interval_text, text_table

if TYPE_CHECKING:
    from softprompt.inspection import (
        AttentionMass,
        Contest,
        Drift,
        FirstValues,
        LeaveOneOut,
        PartSimilarity,
        PartValues,
        PromptSummary,
    )

_Found = TypeVar("_Found")
_NEAREST_SHOWN, _CHANGES_SHOWN = 3, 5


@final
@dataclass(slots=True)
class Inspection:
    """What ``inspect_prompt`` found; a section that is None or empty has its reason in ``missing``.

    Attributes:
        summary: What ``softprompt info`` shows: base, task, size, settings.
        task_name: The task of a multitask prompt whose answers were looked at.
        values: Norms, rank, cosines and nearest tokens of each part of the prompt, by its name.
        similarity: Cosines between its parts, and with the prompts it is set against.
        history: The points of the training curve.
        drift: How far each virtual token moved in each epoch.
        first_values: The virtual tokens against their first values.
        records: Number of records that were looked at.
        attention: Attention mass on the virtual tokens by layer, for each place in the model.
        leave_one_out: Change of the loss without each virtual token.
        words: The vocabulary token of highest cosine with each virtual token, as one text.
        contest: Records won and lost against zero-shot, the words, and other prompts.
        missing: Why a section, or a part of one, is not there, by its name.
    """

    summary: PromptSummary
    task_name: str | None = None
    values: Mapping[str, PartValues] = field(default_factory=dict)
    similarity: Sequence[PartSimilarity] = ()
    history: Sequence[Mapping[str, Any]] = ()
    drift: Drift | None = None
    first_values: FirstValues | None = None
    records: int | None = None
    attention: Mapping[str, AttentionMass] | None = None
    leave_one_out: LeaveOneOut | None = None
    words: str | None = None
    contest: Contest | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def tried(self, section: str, make: Callable[[], _Found]) -> _Found | None:
        """Return what is made, or note why it is missing."""
        try:
            return make()
        except SoftPromptError as error:
            self.missing[section] = str(error)
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes None."""
        found: dict[str, Any] = _finite(asdict(self))
        for name in ("geometry", "nearest"):  # those of each part are in its values
            del found["summary"][name]
        return found

    def __str__(self) -> str:
        """Return the numbers for people; those of each virtual token are in ``to_dict``."""
        parts = (self._value_lines(), self._similarity_lines(), self._drift_lines(), self._answer_lines())
        why = [f"  {name}: {reason}" for name, reason in self.missing.items()]
        return "\n".join(
            [self.summary.location, *(line for part in parts for line in part), *_titled("not here", why)]
        )

    def _value_lines(self) -> Iterator[str]:
        for name, part in self.values.items():
            numbers, shell = part.geometry, part.shell
            ratio = "" if numbers.rms_ratio is None else f", {numbers.rms_ratio:.2f} x the vocabulary's"
            yield f"\n{name}: {part.tokens} virtual tokens"
            yield f"  rms {numbers.rms:.4f}{ratio}; effective rank {numbers.effective_rank:.1f}"
            if shell is not None:
                low, middle, high = shell.quantiles[1], shell.quantiles[3], shell.quantiles[5]
                yield f"  norms {numbers.norm_min:.3g} to {numbers.norm_max:.3g}"
                yield f"  the vocabulary's norms {middle:.3g}, 90 % of them {low:.3g} to {high:.3g}"
            rows = [
                (str(number), *(f"{each.token!r} {each.cosine:.2f}" for each in row[:_NEAREST_SHOWN]))
                for number, row in enumerate(part.nearest or (), start=1)
            ]
            if rows:
                yield from text_table(("token", "nearest by cosine", *[""] * (len(rows[0]) - 2)), rows)

    def _similarity_lines(self) -> list[str]:
        rows = [
            (
                f"{each.first} - {each.second}",
                *("-" if value is None else f"{value:.3f}" for value in (each.mean, each.pairs, each.matched)),
            )
            for each in self.similarity
        ]
        return ["", *text_table(("cosine of", "means", "all pairs", "same number"), rows)] if rows else []

    def _drift_lines(self) -> list[str]:
        found = self.drift
        if found is None:
            return []
        last, size = found.drift[-1], found.rms[-1]
        mean, most = sum(last) / len(last), max(range(len(last)), key=last.__getitem__)
        return _titled(
            f"drift from the start, {len(found.epochs)} epochs (rms)",
            [
                f"  mean {mean:.4f}, against values of {sum(size) / len(size):.4f}",
                f"  most: virtual token {most * found.every + 1}, {last[most]:.4f}",
            ],
        )

    def _answer_lines(self) -> Iterator[str]:
        for place, mass in (self.attention or {}).items():
            shares = [layer.share for layer in mass.layers]
            most = f"most in layer {shares.index(max(shares)) + 1} ({max(shares):.1%})"
            yield f"\nattention of the text to the prompt ({place}), {mass.rows} rows"
            yield f"  mean {sum(shares) / len(shares):.1%}, {most}; uniform attention {mass.uniform:.1%}"
        if (left := self.leave_one_out) is not None:
            yield f"\nleave one out, {left.rows} rows (nats per target token)"
            yield f"  loss {left.loss:.4f}, without the prompt {left.without_prompt:.4f}"
            order = sorted(range(len(left.change)), key=lambda i: -left.change[i])[:_CHANGES_SHOWN]
            rows = [
                (str(i * left.every + 1), f"{left.change[i]:+.4f}", f"{left.standard_error[i]:.4f}") for i in order
            ]
            yield from text_table(("without token", "change", "standard error"), rows)
        if self.words is not None:
            yield f"\nin words: {self.words!r}"
        if (found := self.contest) is not None:
            metrics = list(found.scores["prompt"])
            yield f"\n{found.task}, {found.rows} records"
            yield from text_table(
                ("", *(name.replace("_", " ") for name in metrics)),
                [
                    (name, *(f"{own.get(each, math.nan):.4f}" for each in metrics))
                    for name, own in found.scores.items()
                ],
            )
            yield from text_table(
                ("the prompt against", "won", "lost", "difference", "95 %", "p"),
                [
                    (
                        name,
                        f"{each.won}",
                        f"{each.lost}",
                        f"{each.difference:+.4f}",
                        interval_text(each.interval),
                        f"{each.p_value:.2g}",
                    )
                    for name, each in found.against.items()
                ],
            )


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *lines] if lines else []


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
