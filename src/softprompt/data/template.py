"""The verbalizer: how the fields of a record become the text in front of the answer.

caikit's form: ``{{name}}`` with a name of letters, digits and underscores, no spaces inside, at
least one. Rendering is a single pass, so a value that holds ``{{x}}`` is inserted verbatim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt.data.records import Example
from softprompt.errors import TemplateError, nearest

_PLACEHOLDER = re.compile(r"{{([_a-zA-Z0-9]+)}}")
_NEARLY = re.compile(r"{{?\s*([_a-zA-Z0-9]+)\s*}}?")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a template: literal text, or the name of a field to insert."""

    text: str
    is_field: bool


class Verbalizer:
    """A checked template.

    Attributes:
        template: The text it was made from.
        segments: Literals and fields in order; joined they are the template.
        fields: The names of the fields in order of first use.
    """

    def __init__(self, template: str) -> None:
        """Parse ``template``.

        Raises:
            TemplateError: It has no placeholder.
        """
        # Splitting at a pattern with one group alternates literals and names.
        parts = _PLACEHOLDER.split(template)
        if len(parts) == 1:
            raise TemplateError(
                f"expected at least one placeholder such as {{{{input}}}} in the verbalizer, "
                f"got {template!r}{_spelling_hint(template)}"
            )
        self.template = template
        self.segments = tuple(
            Segment(part, bool(index % 2)) for index, part in enumerate(parts) if part
        )
        self.fields = tuple(dict.fromkeys(parts[1::2]))

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
        return "".join(
            fields[segment.text] if segment.is_field else segment.text for segment in self.segments
        )

    def check(self, examples: Sequence[Example], output_field: str | None = None) -> None:
        """Check the template against every example, before anything is computed.

        Args:
            examples: The records the template is for.
            output_field: The name of the target column, which no template may show.

        Raises:
            TemplateError: The template names the target, or a field that a record lacks.
        """
        if not examples:
            return
        shared = set(examples[0].fields)
        hidden = {output_field} if output_field else {"output", "labels"} - shared
        for name in self.fields:
            if name in hidden:
                raise TemplateError(
                    f"the verbalizer names the target field {name!r}, which would show the answer "
                    f"to the model; use {_listed(shared)}"
                )
        for number, example in enumerate(examples, start=1):
            self._require(example.fields, f"row {number}: ")

    def _require(self, fields: Mapping[str, str], where: str) -> None:
        for name in self.fields:
            if name not in fields:
                raise TemplateError(
                    f"{where}the verbalizer names the unknown field {name!r}; "
                    f"known: {_listed(fields)}{nearest(name, fields)}"
                )


def _listed(names: Mapping[str, str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _spelling_hint(template: str) -> str:
    found = _NEARLY.search(template)
    if found is None:
        return ""
    return f" (write {{{{{found[1]}}}}}, two braces and no spaces, instead of {found[0]!r})"
