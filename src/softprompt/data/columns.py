"""Which column is the input and which the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from softprompt.data.located import Located
from softprompt.errors import DataError, nearest

INPUT = "input"
_PAIRS = ((INPUT, "output"), ("text", "labels"))


@dataclass(frozen=True, slots=True)
class Columns:
    """The meaning of a source's columns, decided once from its first record.

    Attributes:
        input: The column that ``{{input}}`` stands for.
        target: The column that holds the answer, or None where there is none.
    """

    input: str
    target: str | None


def choose_columns(
    first: Located, input_field: str | None, output_field: str | None, *, require_target: bool
) -> Columns:
    """Decide the columns: named ones, else ``input``/``output``, else ``text``/``labels``.

    Raises:
        DataError: A named column is missing, or what is there leaves the choice open.
    """
    present = list(first.record)
    if require_target and input_field is None and output_field is None:
        return _whole_pair(first)
    source = _input_column(first, input_field, output_field)
    if input_field is not None and INPUT in present and source != INPUT:
        raise DataError(
            f"{first.where}: input_field={source!r} clashes with the column 'input', both would be "
            "{{input}}; leave input_field out and name the columns in the verbalizer"
        )
    target = _target_column(first, source, output_field, require_target=require_target)
    if target == source:
        raise DataError(f"{first.where}: the column {source!r} cannot be input and target at once")
    return Columns(source, target)


def _whole_pair(first: Located) -> Columns:
    present = list(first.record)
    for source, target in _PAIRS:
        if source in present and target in present:
            if source != INPUT and INPUT in present:
                break
            return Columns(source, target)
    wanted = [name for pair in _PAIRS for name in pair if name not in present]
    raise DataError(
        f"{first.where}: expected the fields input and output, or text and labels, got "
        f"{_listed(present)}{_first_hint(wanted, present)}; name them with input_field and "
        "output_field"
    )


def _input_column(first: Located, named: str | None, output_field: str | None) -> str:
    present = list(first.record)
    if named is not None:
        _require(named, "input_field", first)
        return named
    found = [source for source, _ in _PAIRS if source in present and source != output_field]
    if len(found) == 2 and _PAIRS[0][1] in present and output_field in (None, _PAIRS[0][1]):
        return INPUT
    if len(found) == 1:
        return found[0]
    problem = "both input and text could be the input" if found else "no field input or text"
    raise DataError(
        f"{first.where}: {problem} among {_listed(present)}"
        f"{_first_hint([source for source, _ in _PAIRS], present) if not found else ''}; "
        "name one with input_field"
    )


def _target_column(
    first: Located, source: str, named: str | None, *, require_target: bool
) -> str | None:
    present = list(first.record)
    if named is not None:
        if named in present or not require_target:
            return named
        _require(named, "output_field", first)
    of_pair = dict(_PAIRS).get(source)
    if of_pair in present:
        return of_pair
    found = [target for _, target in _PAIRS if target in present and target != source]
    if len(found) == 1:
        return found[0]
    if not found and not require_target:
        return None
    problem = "both output and labels could be the target" if found else "no field output or labels"
    raise DataError(
        f"{first.where}: {problem} among {_listed(present)}"
        f"{_first_hint([target for _, target in _PAIRS], present) if not found else ''}; "
        "name one with output_field"
    )


def _require(name: str, option: str, first: Located) -> None:
    present = list(first.record)
    if name not in present:
        raise DataError(
            f"{first.where}: expected the field {name!r} ({option}), got "
            f"{_listed(present)}{nearest(name, present)}"
        )


def _first_hint(wanted: Iterable[str], present: list[str]) -> str:
    return next((hint for name in wanted if (hint := nearest(name, present))), "")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no fields"
