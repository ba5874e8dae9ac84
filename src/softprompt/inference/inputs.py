"""Inputs as callers pass them: texts or mappings of a template's fields, and the tokens they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from softprompt.artifacts import Manifest
from softprompt.data import RowTokenizer, Verbalizer
from softprompt.errors import DataError, TemplateError
from softprompt.generation import Input
from softprompt.prompts import Placement

Fields = str | Mapping[str, Any]
"""One input: a text, for templates of one field, or the template's fields by name."""


def listed(requests: Fields | Iterable[Fields]) -> list[Fields]:
    """Return the requests as a list, also when a single one was passed."""
    if isinstance(requests, str | Mapping):
        return [requests]
    return list(requests)


def fields_of(request: Fields, template_fields: Sequence[str]) -> dict[str, str]:
    """Return the template's fields of one request, as text.

    A bare text stands for the only field of the template; ``text`` stands in for a missing
    ``input``, as in data files.

    Raises:
        TemplateError: The request lacks a field, or a bare text meets several fields.
        DataError: A value is no text or number.
    """
    names = list(dict.fromkeys(template_fields))
    if isinstance(request, str):
        if len(names) != 1:
            raise TemplateError(
                f"the template has the fields {', '.join(names)}, so a bare text is ambiguous; "
                f"pass a mapping such as {{{names[0]!r}: ...}}"
            )
        return {names[0]: request}
    if not isinstance(request, Mapping):
        raise DataError(
            f"an input is a text or a mapping of fields, got {type(request).__name__}; "
            "pass a str or a dict"
        )
    given = dict(request)
    if "input" not in given and "text" in given:
        given["input"] = given["text"]
    missing = [name for name in names if name not in given]
    if missing:
        raise TemplateError(
            f"the template expects the fields {', '.join(names)}, got "
            f"{', '.join(map(str, request)) or 'none'}; add {', '.join(missing)}"
        )
    return {name: _text(name, given[name]) for name in names}


def require_tokens(sources: Sequence[Sequence[int]]) -> None:
    """Check that every input has a token for the model to go on from.

    Raises:
        DataError: An input is empty, and the tokenizer puts no token in front of it.
    """
    for number, source in enumerate(sources, start=1):
        if not source:
            raise DataError(
                f"input {number} has no tokens, there is nothing for the model to read; "
                "give it text or leave it out"
            )


def row_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    placement: Placement = Placement.PREFIX,
) -> RowTokenizer:
    """Return what turns fields into token ids as a prompt's record says.

    Raises:
        ConfigError: The tokenizer has no such placement, or the limits leave no room for text.
        TemplateError: The template cannot be used.
    """
    return RowTokenizer(
        tokenizer,
        Verbalizer(manifest.template),
        max_source_length=manifest.max_source_length,
        max_target_length=manifest.max_target_length,
        seq2seq=manifest.seq2seq,
        placement=placement,
    )


def inputs_of(rows: RowTokenizer, requests: Fields | Iterable[Fields]) -> list[Input]:
    """Return what each input puts before its answer; see ``sources_of``."""
    names = rows.verbalizer.fields
    found = [rows.source(fields_of(each, names)) for each in listed(requests)]
    require_tokens([ids for ids, _ in found])
    return [Input(ids, rows.offset(ids), rows.decode, cut) for ids, cut in found]


def sources_of(
    rows: RowTokenizer, requests: Fields | Iterable[Fields]
) -> tuple[list[tuple[int, ...]], list[bool]]:
    """Return the text tokens of each input, and whether it lost its end.

    Raises:
        TemplateError: An input does not have the template's fields.
        DataError: An input has no tokens.
    """
    found = inputs_of(rows, requests)
    return [each.ids for each in found], [each.cut for each in found]


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"the field {name!r} expects a text or a number, got {type(value).__name__}")
