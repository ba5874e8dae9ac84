"""What was found of a prompt, section by section; and of what was not, why. Numbers, and a text of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, final

from softprompt.errors import SoftPromptError
from softprompt.evaluation import text_table

if TYPE_CHECKING:
    from softprompt.inspection import (
        AttentionMass,
        Contest,
        Drift,
        LeaveOneOut,
        PartSimilarity,
        PartValues,
        PromptSummary,
    )

_Found = TypeVar("_Found")
_NEAREST_SHOWN, _SHOWN = 3, 5


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

    def lack(self, why: str, *sections: str) -> None:
        """Note why some sections are missing."""
        self.missing |= dict.fromkeys(sections, why)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes None."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        for name in ("geometry", "nearest"):  # those of each part are in its values
            del found["summary"][name]
        return found

    def __str__(self) -> str:
        """Return the numbers for people; those of each virtual token are in ``to_dict``."""
        lines = [self.summary.location, *self._value_lines(), *self._training_lines(), *self._answer_lines()]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.missing.items():
            reasons.setdefault(reason, []).append(name)
        why = [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join([*lines, *(["", "not here", *why] if why else [])])

    def _value_lines(self) -> Iterator[str]:
        for name, part in self.values.items():
            numbers, shell = part.geometry, part.shell
            ratio = "" if numbers.rms_ratio is None else f" ({numbers.rms_ratio:.2f} x the vocabulary's)"
            yield f"\n{name}: {part.tokens} virtual tokens"
            yield f"  rms {numbers.rms:.4f}{ratio}, effective rank {numbers.effective_rank:.1f}"
            ends = (
                ""
                if shell is None
                else f"; 90 % of the vocabulary's {shell.quantiles[1]:.3g} to {shell.quantiles[5]:.3g}"
            )
            yield f"  norms {numbers.norm_min:.3g} to {numbers.norm_max:.3g}{ends}"
            for number, row in enumerate(part.nearest or (), start=1):
                shown = "  ".join(f"{each.token!r} {each.cosine:.2f}" for each in row[:_NEAREST_SHOWN])
                yield f"{number:>4}  {shown}"
        rows = [
            (f"{one.first} - {one.second}", *map(_number, (one.mean, one.pairs, one.matched)))
            for one in self.similarity
        ]
        yield from _table(("cosine of", "means", "all pairs", "same number"), rows)

    def _training_lines(self) -> Iterator[str]:
        if (found := self.drift) is not None:
            at = found.epochs.index(found.kept) if found.kept in found.epochs else -1
            moved, size = found.drift[at], found.rms[at]
            most = f"most {max(moved):.4f} (token {moved.index(max(moved)) * found.every + 1})"
            epoch = f"epoch {found.epochs[at]} of {found.epochs[-1]}"
            yield f"\ndrift from the start at {epoch}: mean {sum(moved) / len(moved):.4f}, {most}"
            yield f"  root mean squares; of the values {sum(size) / len(size):.4f}"
            if found.kept == 0:
                yield "  but the prompt was kept as it started"

    def _answer_lines(self) -> Iterator[str]:
        for place, mass in (self.attention or {}).items():
            shares = [layer.share for layer in mass.layers]
            most = f"{max(shares):.1%} (layer {shares.index(max(shares)) + 1})"
            yield f"\nattention to the prompt ({place}): mean {sum(shares) / len(shares):.1%}, most {most}"
            yield f"  uniform attention would be {mass.uniform:.1%}; {mass.rows} rows"
        if (left := self.leave_one_out) is not None:
            yield f"\nloss {left.loss:.4f} nats per target token, {left.rows} rows"
            yield f"  without the prompt {left.without_prompt:.4f}"
            order = sorted(range(len(left.change)), key=lambda i: -left.change[i])[:_SHOWN]
            changes = [
                (f"{i * left.every + 1}", f"{left.change[i]:+.4f}", f"{left.standard_error[i]:.4f}") for i in order
            ]
            yield from _table(("without token", "change", "standard error"), changes)
        if self.words is not None:
            yield f"\nin words: {self.words!r}"
        if (found := self.contest) is not None:
            metrics, rows = list(found.scores["prompt"]), []
            for name, own in found.scores.items():
                one = found.against.get(name)
                result = ("", "", "") if one is None else (f"{one.won}", f"{one.lost}", f"{one.p_value:.2g}")
                rows.append((name, *(_number(own.get(each)) for each in metrics), *result))
            yield from _table((f"{found.task}, {found.rows} records", *metrics, "won", "lost", "p"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *text_table(head, rows)] if rows else []


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
