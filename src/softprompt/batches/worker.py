"""What one worker of a batch does: it holds the base and all prompts, and answers records or says why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final

from softprompt.cluster import device_there
from softprompt.data import Located, json_record, read_records
from softprompt.errors import SoftPromptError, UsageError, nearest
from softprompt.inference import Serving, load_many

if TYPE_CHECKING:
    from softprompt.batches.parts import Row
    from softprompt.inference import Fields


@final
@dataclass(frozen=True, slots=True)
class BatchTask:
    """What is asked of each record.

    Attributes:
        command: ``generate``, ``classify``, or ``evaluate``: the label, or the text of a prompt without labels.
        prompts: Folders of the prompts, by the names in ``column``.
        column: The column that names the prompt; None where there is one.
        options: Arguments of ``Serving.generate`` or ``Serving.classify``.
        reading: How the base is read: arguments of ``load``.
        columns: Names of the input and the target column, where they are not those of the prompt's tuning.
    """

    command: Literal["generate", "classify", "evaluate"]
    prompts: Mapping[str, str]
    column: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str | None] = field(default_factory=dict)


@final
class BatchWorker:
    """Answers records with prompts of one base, which are loaded once."""

    def __init__(self, asked: BatchTask) -> None:
        self._asked = asked
        reading = {"device": device_there(), **asked.reading}
        found = load_many(list(asked.prompts.values()), **reading)
        self._prompts = dict(zip(asked.prompts, found, strict=True))
        self._serving = Serving(self._prompts)

    def ready(self) -> bool:
        """Return true, once everything is loaded."""
        return True

    def answer(self, lines: Sequence[str], first: int) -> list[Row]:
        """Return an answer to each line of JSON, in order, numbered from ``first``; a bad one has an ``error``."""
        found = [dict[str, Any](record=number) for number in range(first, first + len(lines))]
        asked: list[tuple[Row, str, Fields]] = []
        for line, answer in zip(lines, found, strict=True):
            try:
                asked.append((answer, *self._read(line, answer)))
            except SoftPromptError as error:
                answer["error"] = str(error)
        kinds = [self._kind(name) for _, name, _ in asked]
        for kind in dict.fromkeys(kinds):
            self._fill([each for each, own in zip(asked, kinds, strict=True) if own == kind], kind)
        return [answer | {"error": answer.get("error")} for answer in found]

    def _read(self, line: str, answer: Row) -> tuple[str, Fields]:
        """Return the prompt and the input of a record; its prompt and target go into the answer."""
        where = f"record {answer['record']}"
        row, column = dict(json_record(line, where).record), self._asked.column
        name = next(iter(self._prompts)) if column is None else row.pop(column, None)
        if not isinstance(name, str):
            raise UsageError(f"expected the name of a prompt in {column}, got {type(name).__name__}")
        if column is not None:
            answer["prompt"] = name
        if name not in self._prompts:
            raise UsageError(
                f"there is no prompt {name!r}{nearest(str(name), self._prompts)}, which {column} names"
            )
        tuned = self._prompts[name]
        own = {each: tuned.manifest.settings.get(each) for each in ("input_field", "output_field")}
        own |= {each: given for each, given in self._asked.columns.items() if given is not None}
        (record,) = read_records([Located(where, row)], **own, require_target=self._asked.command == "evaluate")
        if self._asked.command == "evaluate":
            answer["target"] = record.target
        chat = record.chat.asked() if record.chat and tuned.manifest.chat else None
        return name, record.fields if chat is None else {"messages": chat.messages, "tools": chat.tools}

    def _kind(self, name: str) -> int | None:
        """Return what records of a prompt share in one call: None for labels, or the most new tokens, 0 for any."""
        tuned, command = self._prompts[name], self._asked.command
        if command == "evaluate":
            return None if tuned.labels is not None else tuned.manifest.max_target_length
        return None if command == "classify" else 0

    def _fill(self, asked: Sequence[tuple[Row, str, Fields]], kind: int | None) -> None:
        """Answer all at once; where one is refused, halves, so that it alone has the error."""
        names, inputs = [name for _, name, _ in asked], [given for _, _, given in asked]
        answer: Any = self._serving.classify if kind is None else self._serving.generate
        options = {**self._asked.options, **({"max_new_tokens": kind} if kind else {})}
        try:
            for (row, _, _), found in zip(asked, answer(inputs, names, **options), strict=True):
                row.update(found.to_dict())
        except SoftPromptError as error:
            if len(asked) == 1:
                asked[0][0]["error"] = str(error)
                return
            half = len(asked) // 2
            self._fill(asked[:half], kind)
            self._fill(asked[half:], kind)
