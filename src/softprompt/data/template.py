"""The verbalizer: the template that turns the fields of a record into the input text.

caikit's form: ``{{name}}``, at least one. Beyond caikit's names of letters, digits and underscores
a name may have spaces, dashes and the like inside, as columns of tables do, but neither braces,
double quotes nor line ends, and no space at its ends. Rendering is a single pass, so a value that
holds ``{{x}}`` is inserted verbatim. Mustache's sections print a part where a field has text,
``{{#name}}...{{/name}}``, or has none, ``{{^name}}...{{/name}}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from softprompt.data.records import INPUT, Record
from softprompt.errors import TemplateError, broken, excerpt, nearest

_NAME = r"\w(?:[^{}\"\r\n]*[^{}\"\s])?"
PLACEHOLDER = re.compile(f"{{{{({_NAME})}}}}")
_SECTION = re.compile(rf"{{{{([#^])({_NAME})}}}}(.*?){{{{/\2}}}}", re.DOTALL)
_NEARLY = re.compile(rf"{{{{?\s*({_NAME})\s*}}}}?")
_MOST_SECTIONS = 100
_NOTHING: Mapping[str, str] = {}


ALPACA = (
    "Below is an instruction that describes a task{{#input}}, paired with an input that provides further context"
    "{{/input}}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{instruction}}\n\n{{#input}}### Input:\n{{input}}\n\n{{/input}}### Response:\n"
)
"""The template of Alpaca's instructions, with and without an input (Taori et al. 2023)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a template: literal text, or the name of a field to insert.

    ``section`` is the field of the section it stands in; it is printed where that has text, or none if ``absent``.
    """

    text: str
    is_field: bool
    section: str = ""
    absent: bool = False

    def is_printed(self, fields: Mapping[str, str]) -> bool:
        """Whether it is printed for these fields."""
        return not self.section or bool(fields.get(self.section, "").strip()) != self.absent


class Verbalizer:
    """A checked template.

    Attributes:
        template: The text it was made from.
        segments: Literals and fields in order.
        fields: The names of the fields in order of first use, then those that only decide over a section.
        optional: Those that need not be there, because they decide over a section.
    """

    def __init__(self, template: str) -> None:
        """Parse ``template``.

        Raises:
            TemplateError: It has no placeholder, or half a character.
        """
        if problem := broken(template):
            raise TemplateError(f"the verbalizer {template!r} holds {problem}; write it in UTF-8")
        if template.count("{{#") + template.count("{{^") > _MOST_SECTIONS:  # each is looked for to the end
            raise TemplateError(
                f"expected at most {_MOST_SECTIONS} sections in the verbalizer {excerpt(template)!r}"
            )
        self.segments = tuple(_segments(template))
        inserted = [each.text for each in self.segments if each.is_field]
        sections = [each.section for each in self.segments if each.section]
        self.fields, self.optional = tuple(dict.fromkeys([*inserted, *sections])), {*sections}
        if not {*self.fields} - self.optional:
            raise TemplateError(
                f"expected at least one placeholder such as {{{{input}}}} in the verbalizer, "
                f"got {template!r}{_spelling_hint(template)}"
            )
        if self.segments[-1].section:
            raise TemplateError(f"a verbalizer cannot end in a section, got {template!r}; put text behind it")
        self.template = template

    @property
    def literals(self) -> tuple[str, ...]:
        """The template's own text."""
        return tuple(segment.text for segment in self.segments if not segment.is_field)

    @property
    def tail(self) -> str:
        """The literal text behind the last field, empty when a field comes last."""
        return "" if self.segments[-1].is_field else self.segments[-1].text

    def render(self, fields: Mapping[str, str]) -> str:
        """Return the template with each placeholder replaced by its field.

        Raises:
            TemplateError: A field is missing.
        """
        self._require(fields, "")
        shown = [segment for segment in self.segments if segment.is_printed(fields)]
        return "".join(fields[segment.text] if segment.is_field else segment.text for segment in shown)

    def check(self, records: Sequence[Record], output_field: str | None = None) -> None:
        """Check the template against every record, before anything is computed.

        Args:
            records: The records the template is for.
            output_field: The name of the target column, which no template may name.

        Raises:
            TemplateError: The template names the target, or a field that a record lacks.
        """
        if not records:
            return
        shared = set(records[0].fields)
        hidden = {output_field} if output_field else {"output", "labels", "label"} - shared
        for name in self.fields:
            if name in hidden:
                raise TemplateError(
                    f"the verbalizer names the target field {name!r}, which would show the answer "
                    f"to the model; use {_listed(shared)}"
                )
        for number, record in enumerate(records, start=1):
            self._require(record.fields, f"record {number}: ", record.left_out)

    def _require(self, fields: Mapping[str, str], where: str, left_out: Mapping[str, str] = _NOTHING) -> None:
        for name in self.fields:
            if name in left_out:
                raise TemplateError(
                    f"{where}the verbalizer names the field {name!r}, which holds no text but a value of type "
                    f"{left_out[name]}; known: {_listed(fields)}"
                )
            if name not in fields and name not in self.optional:
                hint = nearest(name, fields)
                if name == INPUT and not hint:
                    hint = "; name the column of the input with input_field, or a known one in the verbalizer"
                raise TemplateError(
                    f"{where}the verbalizer names the unknown field {name!r}; known: {_listed(fields)}{hint}"
                )


def _segments(template: str) -> Iterator[Segment]:
    start = 0
    for found in [*_SECTION.finditer(template), None]:
        yield from _pieces(template[start : found.start() if found else None])
        if found:
            start = found.end()
            yield from _pieces(found[3], found[2], absent=found[1] == "^")


def _pieces(text: str, section: str = "", *, absent: bool = False) -> Iterator[Segment]:
    # Splitting at a pattern with one group alternates literals and names.
    for index, part in enumerate(PLACEHOLDER.split(text)):
        if part:
            yield Segment(part, bool(index % 2), section, absent)


def _listed(names: Mapping[str, str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _spelling_hint(template: str) -> str:
    found = _NEARLY.search(template)
    if found is None:
        return ""
    return f" (write {{{{{found[1]}}}}}, two braces and no spaces, instead of {found[0]!r})"


def cut_values(
    fields: Mapping[str, str], names: tuple[str, ...], fits: Callable[[Mapping[str, str]], bool]
) -> dict[str, str]:
    """Return ``fields`` with the values of ``names`` truncated, longest first, until ``fits`` holds.

    All values longer than a common number of characters are cut to it, the largest number that
    fits, so the longest value loses first and short ones stay whole. Empty values must fit.
    """
    names = tuple(name for name in names if name in fields)
    low, high = 0, max((len(fields[name]) for name in names), default=0)
    best = _cut_to(fields, names, low)
    while high - low > 1:
        middle = (low + high) // 2
        candidate = _cut_to(fields, names, middle)
        if fits(candidate):
            low, best = middle, candidate
        else:
            high = middle
    return best


def _cut_to(fields: Mapping[str, str], names: tuple[str, ...], characters: int) -> dict[str, str]:
    cut = dict(fields)
    for name in names:
        if len(cut[name]) > characters:
            # A space left hanging at the cut would become a token of its own.
            cut[name] = cut[name][:characters].rstrip()
    return cut
