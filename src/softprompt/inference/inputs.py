"""What a caller passes in: inputs as text or fields, and the prompt and task that each is for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from softprompt.artifacts import Manifest
from softprompt.data import Chat, ChatMessage, RowTokenizer, Verbalizer, chat_of, is_chat
from softprompt.errors import ConfigError, DataError, TemplateError, broken, excerpt, nearest
from softprompt.generation import Input
from softprompt.prompts import Placement

Fields = str | Mapping[str, Any]
"""One input: a text, for templates of one field and for chats, or fields by name, such as a chat's ``messages``."""

Messages = Sequence[ChatMessage]
"""One input of a prompt that was trained on chats."""

Inputs = Fields | Messages | Iterable[Fields | Messages]
"""One input or several."""


def is_single(requests: Inputs) -> bool:
    """Whether it is one input, not several."""
    return isinstance(requests, str | Mapping) or is_chat(requests)


def listed(requests: Inputs) -> list[Fields]:
    """Return the requests as a list, also when a single one was passed.

    Raises:
        DataError: One of them holds half a character.
    """
    given: Iterable[Any] = [requests] if is_single(requests) else requests
    found: list[Fields] = [{"messages": each} if is_chat(each) else each for each in given]
    for number, request in enumerate(found, start=1):
        for text in request.values() if isinstance(request, Mapping) else [request]:
            if isinstance(text, str) and (problem := broken(text)):
                raise DataError(f"input {number} holds {problem}; correct the text")
    return found


def given_of(request: Fields, rows: RowTokenizer) -> dict[str, str] | Chat:
    """Return what a prompt reads of one request: the fields of its template, or a chat; raises as they do."""
    if rows.chats is not None:
        return chat_of(request)
    return fields_of(request, rows.verbalizer.fields, rows.verbalizer.optional)


def fields_of(request: Fields, template_fields: Sequence[str], optional: Collection[str] = ()) -> dict[str, str]:
    """Return the template's fields of one request, as text.

    A bare text stands for the only field of the template; ``text`` stands in for a missing
    ``input``, as in data files. ``optional`` fields need not be there.

    Raises:
        TemplateError: The request lacks a field, or a bare text meets several fields.
        DataError: A value is no text or number.
    """
    names = list(dict.fromkeys(template_fields))
    if isinstance(request, str):
        names = [name for name in names if name not in optional]
        if len(names) != 1:
            raise TemplateError(
                f"the template has the fields {', '.join(names)}, so a bare text is ambiguous; "
                f"pass a mapping such as {{{names[0]!r}: ...}}"
            )
        return {names[0]: request}
    if not isinstance(request, Mapping):
        raise DataError(
            f"an input is a text or a mapping of fields, got {type(request).__name__}; pass a str or a dict"
        )
    given = dict(request)
    if "input" not in given and "text" in given:
        given["input"] = given["text"]
    missing = [name for name in names if name not in given and name not in optional]
    if missing and "messages" in given:
        raise TemplateError(f"this prompt was not trained on chats; pass a text, or the fields {', '.join(names)}")
    if missing:
        raise TemplateError(
            f"the template expects the fields {', '.join(names)}, got "
            f"{', '.join(map(str, request)) or 'none'}; add {', '.join(missing)}"
        )
    return {name: _text(name, given[name]) for name in names if name not in optional or given.get(name) is not None}


def require_tokens(sources: Sequence[Sequence[int]]) -> None:
    """Raise ``DataError`` for an input without a token for the model to go on from."""
    for number, source in enumerate(sources, start=1):
        if not source:
            raise DataError(
                f"input {number} has no tokens, there is nothing for the model to read; "
                "give it text or leave it out"
            )


def row_tokenizer(
    tokenizer: PreTrainedTokenizerBase, manifest: Manifest, placement: Placement = Placement.PREFIX
) -> RowTokenizer:
    """Return what turns fields into token ids as a prompt's manifest says; raises as ``RowTokenizer``."""
    return RowTokenizer(
        tokenizer,
        Verbalizer(manifest.template),
        max_source_length=manifest.max_source_length,
        max_target_length=manifest.max_target_length,
        seq2seq=manifest.seq2seq,
        placement=placement,
        chats="last" if manifest.chat else None,
    )


def inputs_of(rows: RowTokenizer, requests: Inputs) -> list[Input]:
    """Return what each input puts before its answer.

    Raises:
        TemplateError: An input does not have the template's fields.
        DataError: An input has no tokens, or half a character.
    """
    found = [rows.source(given_of(each, rows)) for each in listed(requests)]
    require_tokens([ids for ids, _ in found])
    return [Input(ids, rows.offset(ids), rows.decode, cut) for ids, cut in found]


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"the field {name!r} expects a text or a number, got {type(value).__name__}")


Task = str | int
"""A task of a multitask prompt, by its name or its number."""

TaskNames = Task | Sequence[Task]
"""One task for all rows, or one for each."""

Names = str | Sequence[str]
"""One prompt for all inputs, or one for each."""

Tasks = Task | Sequence[Task | None] | None
"""One task for all inputs, or one for each; None where a prompt has one."""


class Addressed(NamedTuple):
    """An input, with the prompt and the task that answer it."""

    request: Fields
    prompt: str
    task: Task | None


def check_names(names: Iterable[object]) -> None:
    """Raise ``ConfigError`` where there is no prompt, or the name of one is no text."""
    given = list(names)
    if not given:
        raise ConfigError("expected at least one prompt to serve, got none; name one")
    for name in given:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"expected a text as the name of a prompt, got {name!r}; call it by a word")


def addressed(requests: Inputs, prompts: Names, task_name: Tasks) -> list[Addressed]:
    """Return each input with the prompt and the task that answer it.

    Raises:
        ConfigError: There is not one prompt, or one task, for each input.
    """
    inputs = listed(requests)
    names = [prompts] * len(inputs) if isinstance(prompts, str) else list(prompts)
    tasks: list[Task | None]
    if task_name is None or isinstance(task_name, str | int):
        tasks = [task_name] * len(inputs)
    else:
        tasks = list(task_name)
    for what, count in (("prompts", len(names)), ("task_name", len(tasks))):
        if count != len(inputs):
            raise ConfigError(f"{what} expects one name, or one for each of the {len(inputs)} inputs, got {count}")
    return [Addressed(*each) for each in zip(inputs, names, tasks, strict=True)]


def task_number(task: Task | None, manifest: Manifest, count: int) -> int:
    """Return the number of a task of a prompt that has ``count`` of them.

    Raises:
        ConfigError: there is no such task, or none is named where there are several.
    """
    names = manifest.tasks or tuple(map(str, range(count)))
    known = ", ".join(names)
    if task is None:
        if count == 1:
            return 0
        raise ConfigError(
            f"this prompt has {count} tasks ({known}); choose one by name or number: task_name=..., "
            "--task-name on the command line, or task in a request to a server"
        )
    if task in names:
        return names.index(str(task))
    number = int(task) if str(task).isdecimal() else count
    if number < count:
        return number
    given = repr(excerpt(task)) if isinstance(task, str) else task
    raise ConfigError(f"this prompt has no task {given}{nearest(str(task), names)}; its tasks are {known}")
