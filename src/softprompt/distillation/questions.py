"""What the teacher is asked: questions that are given, or self-study, in which the base asks about its own text.

Self-study (Eyuboglu et al. 2025, arXiv:2506.06266): a passage is in context, a generic seed of one of five kinds
asks for a question, which is sampled; the passage answers it greedily. What is kept apart comes from seeds of
other kinds.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, cast

from softprompt.data import INPUT, TARGET, DataSource, Record, RowTokenizer, chat_of, read_records
from softprompt.errors import ArtifactError, DataError
from softprompt.generation import GenerationOptions
from softprompt.untrusted import check_types

if TYPE_CHECKING:
    from softprompt.distillation import DistillSettings

logger = logging.getLogger(__name__)

GIVEN = "given"
"""The kind of a question that was given."""
OWN = "distillation"
"""Column of a finished run's questions with what no other command reads of them."""
PASSAGE = "passage"
"""Column that says which passage a given question is about, from 1, where there are several."""

SEEDS: Mapping[str, tuple[str, ...]] = {
    "structure": (
        "Ask for one part of the text above to be put into a table, a list or another structure. Name the part.",
        "Write an instruction to organise some facts of the text above in a given format, such as JSON or a list.",
    ),
    "summary": (
        "Ask for a summary of one part of the text above. Name the part.",
        "Write a request to explain the main points of one section of the text above briefly.",
    ),
    "question": (
        "Ask one question that tests the knowledge of a detail of the text above, such as a name or a number.",
        "Write a short question that the text above answers.",
    ),
    "use case": (
        "Think of somebody who needs the text above for a task. Write that person's message that asks for help.",
        "Write a practical question of a user to whom the text above matters.",
    ),
    "creative": (
        "Write an imaginative question that was inspired by the text above, to start a conversation.",
        "Ask for something original, such as a story or a poem, that uses what the text above says.",
    ),
}
"""What asks the base for a question to train on, by kind."""

OTHER_SEEDS: Mapping[str, tuple[str, ...]] = {
    "comparison": (
        "Ask how two things that the text above mentions differ.",
        "Write a question that compares two statements of the text above.",
    ),
    "consequence": (
        "Ask what follows from something that the text above says.",
        "Write a question that starts with why or what if, about the text above.",
    ),
}
"""Those of questions that are kept apart."""

_ONLY = " Answer only with the message itself, nothing else."
_TEMPERATURE, _NEW = 0.6, 96
"""How a question is sampled, and its tokens at most."""
_MOST_DRAWN = 6
"""Questions drawn at most for each that is wanted."""
_REPEATED_WORDS, _LEAST_VARIED = 16, 0.25
"""Words from which on a text is degenerate that has a smaller share of different ones."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a passage; ``asdict`` gives plain JSON values.

    Attributes:
        request: What is asked, as a prompt takes it: fields of the template, or the ``messages`` of a chat.
        answer: The answer; None before there is one.
        passage: Number of the passage that answers it.
        kind: ``given``, or the kind of the seed it was asked by.
        labelled: Whether the answer was given.
        held_out: Whether it is kept apart.
        scores: What the passage's reader gives each label as the answer, in nats; None without labels.
    """

    request: Mapping[str, Any]
    answer: str | None
    passage: int = 0
    kind: str = GIVEN
    labelled: bool = False
    held_out: bool = False
    scores: Mapping[str, float] | None = None

    @property
    def text(self) -> str:
        """The question as one text."""
        messages = self.request.get("messages")
        texts = self.request.values() if messages is None else [each["content"] for each in messages]
        return "\n".join(map(str, texts))

    def to_record(self, columns: Mapping[str, str | None]) -> dict[str, Any]:
        """Return it as a record of a data file with such columns; what only a distillation knows is apart."""
        own = asdict(self)
        record, answer = own.pop("request"), own.pop("answer")
        if isinstance(record.get("messages"), list):
            record["messages"].append({"role": "assistant", "content": answer})
        else:
            record[columns["output_field"] or TARGET] = answer
            if columns["input_field"] in record.keys() - {INPUT}:
                del record[INPUT]  # the same text twice
        return {**record, OWN: own}

    @classmethod
    def of_record(cls, record: Mapping[str, Any], columns: Mapping[str, str | None]) -> Self:
        """Return what ``to_record`` wrote.

        Raises:
            ArtifactError: A value is not as it wrote it.
            LookupError: One is missing.
        """
        values = dict(record)
        if OWN in record:  # earlier versions wrote the attributes as they are
            values, request = dict(record[OWN]), {name: each for name, each in record.items() if name != OWN}
            if isinstance(request.get("messages"), list):
                *request["messages"], last = request["messages"]
                values["answer"] = last["content"]
            else:
                values["answer"] = request.pop(columns["output_field"] or TARGET)
                if columns["input_field"] in request:
                    request[INPUT] = request[columns["input_field"]]
            values["request"] = request
        check_types(cls, values, "a question", ArtifactError)
        return cls(**values)

    def record(self, *, chat: bool) -> Record:
        """Return it as a record to train on, as a chat or as the fields of a template."""
        if not chat:
            return Record({name: str(value) for name, value in self.request.items()}, self.answer)
        asked = chat_of(self.request)
        whole = asked if self.answer is None else replace(asked.answered(self.answer), given=len(asked.messages))
        return Record({INPUT: self.text}, self.answer, chat=whole)


def given_questions(
    source: DataSource, rows: RowTokenizer, passages: int, settings: DistillSettings
) -> list[Question]:
    """Read questions, with answers or without, and draw those that are kept apart.

    Args:
        source: Records of a question each; ``passage`` says which of several passages it is about.
        rows: What renders them, as chats or by a template.
        passages: How many passages there are.
        settings: Say how many are kept apart, and name the columns.

    Raises:
        DataError: There are none, one does not fit the template, has a column of a run's own, or does not say its
            passage.
    """
    records = read_records(source, require_target=False, use="train", **cast(Any, settings.columns))
    rows.check(records, settings.output_field)
    if any(OWN in each.fields for each in records):
        raise DataError(f"the questions have a column {OWN!r}, which a run's own files use; name it otherwise")
    chat = rows.chats is not None
    found = [_given(each, n, chat, passages) for n, each in enumerate(records, start=1)]
    first: dict[str, Question] = {}
    for each in found:
        first.setdefault(each.text, each)
    unique = list(first.values())
    if len(unique) < len(found):
        logger.warning("%s questions are there twice; each is used once", f"{len(found) - len(unique):,}")
    share, draw = settings.held_out, random.Random(f"held out {settings.seed}")
    count = min(round(share * len(unique)) or int(share > 0), len(unique) - 1)
    apart = set(draw.sample(range(len(unique)), count))
    return [replace(each, held_out=i in apart) for i, each in enumerate(unique)]


def _given(record: Record, number: int, chat: bool, passages: int) -> Question:
    passage = 1
    if passages > 1:
        named = record.fields.get(PASSAGE, "")
        passage = int(named) if named.isdecimal() else 0
        if not 1 <= passage <= passages:
            raise DataError(
                f"question {number}: the text is {passages} passages, so expected the number of one in the column "
                f"{PASSAGE!r}, got {named or 'none'}; add it, or use self_study"
            )
    if not chat:
        own = passages == 1  # else that column is no field of a template
        request: dict[str, Any] = {name: text for name, text in record.fields.items() if own or name != PASSAGE}
    elif record.chat is not None:
        asked = record.chat.asked()
        request = {"messages": [dict(each) for each in asked.messages]}
        request |= {} if asked.tools is None else {"tools": asked.tools}
    elif INPUT in record.fields:
        request = request_of(record.fields[INPUT], chat=True)
    else:
        raise DataError(
            f"question {number}: expected a text or messages, got {', '.join(record.fields) or 'nothing'}"
        )
    return Question(request, record.target, passage - 1, labelled=record.target is not None)


@dataclass
class Study:
    """Self-study, as far as it has come: a function of the seed and of how many questions were drawn.

    Attributes:
        counts: Questions wanted, to train on and to keep apart.
        passages: How many passages there are.
        chat: Whether a question is a chat.
        seed: Seed of everything drawn.
        drawn: Questions drawn so far, to train on and to keep apart.
        questions: Those that were kept.
        dropped: Why others were not, and how many.
    """

    counts: tuple[int, int]
    passages: int
    chat: bool
    seed: int
    drawn: list[int] = field(default_factory=lambda: [0, 0])
    questions: list[Question] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, settings: DistillSettings, chat: bool, passages: int) -> Study:
        """Return the study of a run, before its first question."""
        count = settings.self_study or 0
        apart = max(1, round(settings.held_out * count)) if settings.held_out else 0
        return cls((count, apart), passages, chat, settings.seed)

    def wanted(self, size: int) -> list[tuple[Question, GenerationOptions]]:
        """Return the next seeds to ask, ``size`` at most; none when there are enough questions."""
        for apart in (False, True):
            count, first = self.counts[apart], self.drawn[apart]
            have = sum(each.held_out == apart for each in self.questions)
            left = min(count - have, _MOST_DRAWN * count - first, size)
            if left > 0:
                self.drawn[apart] += left
                return [self.seed_of(n, apart=apart) for n in range(first, first + left)]
        return []

    def seed_of(self, number: int, *, apart: bool) -> tuple[Question, GenerationOptions]:
        """Return what asks for a question, and how that is sampled."""
        draw, seeds = random.Random(f"self-study {self.seed} {apart} {number}"), OTHER_SEEDS if apart else SEEDS
        kind = list(seeds)[number % len(seeds)]
        asked = request_of(draw.choice(seeds[kind]) + _ONLY, chat=self.chat)
        how = GenerationOptions(max_new_tokens=_NEW, temperature=_TEMPERATURE, seed=draw.getrandbits(31))
        return Question(asked, None, draw.randrange(self.passages), kind, held_out=apart), how

    def kept(self, seeds: Sequence[Question], texts: Sequence[str]) -> list[Question]:
        """Return the questions that can be used of what the base asked; the others are counted."""
        known = {_alike(each.text) for each in self.questions}
        found = []
        for seed, text in zip(seeds, texts, strict=True):
            asked = text.strip().strip('"').strip()
            if not (reason := problem(asked)) and _alike(asked) in known:
                reason = "asked before"
            if reason:
                self.dropped[f"questions {reason}"] += 1
                continue
            known.add(_alike(asked))
            found.append(replace(seed, request=request_of(asked, chat=self.chat)))
        return found

    def add(self, questions: Sequence[Question]) -> None:
        """Take answered questions; those with an unusable answer are counted."""
        for question in questions:
            if reason := problem(question.answer or ""):
                self.dropped[f"answers {reason}"] += 1
            else:
                self.questions.append(question)


def request_of(text: str, *, chat: bool) -> dict[str, Any]:
    """Return a text as a request."""
    return {"messages": [{"role": "user", "content": text}]} if chat else {INPUT: text}


def seeds_of_kinds(*, chat: bool) -> dict[str, Question]:
    """Return one of the seeds of each kind."""
    seeds = {**SEEDS, **OTHER_SEEDS}.items()
    return {kind: Question(request_of(texts[0] + _ONLY, chat=chat), None) for kind, texts in seeds}


def problem(text: str) -> str:
    """Return what makes a generated text useless: ``empty`` or ``repetitive``; empty where nothing does."""
    words = text.lower().split()
    if not words:
        return "empty"
    repeats = len(words) >= _REPEATED_WORDS and len(set(words)) < _LEAST_VARIED * len(words)
    return "repetitive" if repeats else ""


def _alike(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()
