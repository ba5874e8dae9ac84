"""What a distillation achieved: how a prompt answers that replaced a text, beside cheaper texts and the whole one.

Measured on questions that were kept apart, asked by seeds of other kinds than those trained on. The aim is what the
base does behind the prompt, never how well it recites the text: prompts that reconstructed 99 % of a text under
teacher forcing could write next to nothing of it by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from softprompt.artifacts import write_atomically
from softprompt.data import INPUT, DataSource, TokenRow, read_records
from softprompt.distillation import (
    Distilled,
    HeldOut,
    Question,
    Teacher,
    divergence_of,
    request_of,
    targets_of,
    tokens_read,
)
from softprompt.engine import Engine, EngineRow
from softprompt.errors import DataError
from softprompt.evaluation import text_metrics
from softprompt.generation import GenerationOptions, Request, rows_of_whole_inputs, score_rows

if TYPE_CHECKING:
    from softprompt.distillation import Divergence
    from softprompt.inference import TunedPrompt

REPORT_NAME = "distillation.json"
"""The report in the finished output."""

UNRELATED: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("How many legs does a spider have?", "A spider has eight legs, two more than an insect."),
    (
        "Why is the sky blue?",
        "Air scatters blue light more strongly than red light, so blue reaches us from all sides.",
    ),
    ("Write a sentence about the sea.", "The waves rolled in slowly and left a line of foam on the sand."),
    ("What does a baker do?", "A baker mixes flour, water and yeast into dough and bakes bread from it."),
    ("Name three colours.", "Red, green and yellow."),
    ("What is 12 times 4?", "12 times 4 is 48."),
    ("How do birds fly?", "Birds flap their wings, which push air down and back and lift the bird up."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare around 1595."),
    ("What is photosynthesis?", "Plants use sunlight to make sugar and oxygen from water and carbon dioxide."),
    ("Give me a synonym of happy.", "A synonym of happy is glad."),
    ("What happens when ice melts?", "It takes up heat and turns from a solid into liquid water."),
)
"""Questions that have nothing to do with most texts, with an answer each."""

TOP_K = 20
"""Most likely tokens that are compared, where nothing else was set."""
_SUMMARY = "Summarise the text above in at most {} words. Keep every rule, name and number that matters."
_WORDS_PER_TOKEN = 0.7
_NAME_WIDTH = 26


@final
@dataclass(frozen=True, slots=True)
class Reader:
    """The base behind one thing, against the base behind the whole text.

    Attributes:
        name: What it has read.
        tokens: Tokens, or virtual tokens, before each question, on average.
        nats: Mean KL(whole text || this) of an answer's token, in nats.
        agreement: Share of the answers' tokens whose most likely one is the same.
        share: Share of the way from nothing to the whole text, ``1 - nats / nats of no text``.
        accuracy: Share of the given labels that it gives; None where there are none.
        exact_match: Share of other given answers that it writes, as in ``TextMetrics``; likewise.
    """

    name: str
    tokens: float
    nats: float
    agreement: float
    share: float
    accuracy: float | None = None
    exact_match: float | None = None


@final
@dataclass(frozen=True, slots=True)
class DistillationReport:
    """What a distillation achieved.

    Attributes:
        questions: Questions that were kept apart.
        kinds: Their kinds.
        answer_tokens: Tokens of their answers, which everything is measured on.
        readers: No text, the text's first P tokens, a summary of at most P tokens, the prompt, the whole text.
        tokens_saved: Tokens of a request that need not be read any more.
        bytes_saved: Bytes of keys and values that they would fill in the base's dtype.
        tokens_read: Tokens that the run read, roughly: each trained one counts twice (forward and backward), those
            of the teacher in each of its stages, as ``tokens_read`` of the stages has them.
        requests_to_pay: Requests after which it has paid: ``tokens_read / tokens_saved``, for a server that reads
            the text anew for each request.
        damage: KL(bare base || base with the prompt), and with the text, on answers to unrelated questions, in nats
            per token.
        unrelated: How many these are.
    """

    questions: int
    kinds: tuple[str, ...]
    answer_tokens: int
    readers: tuple[Reader, ...]
    tokens_saved: float
    bytes_saved: float
    tokens_read: float
    requests_to_pay: float | None
    damage: Mapping[str, float]
    unrelated: int

    @property
    def prompt(self) -> Reader:
        """The base with the prompt."""
        return next(each for each in self.readers if each.name == PROMPT)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report of ``to_dict``'s values."""
        return cls(**{**values, "readers": tuple(Reader(**each) for each in values["readers"])})

    def write(self, directory: Path) -> None:
        """Write it beside a prompt, as JSON."""
        write_atomically(directory / REPORT_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    def metrics(self) -> dict[str, float]:
        """Return the main numbers, for the prompt's record and its card."""
        own = {"nats_per_token": self.prompt.nats, "top_1_agreement": self.prompt.agreement}
        own |= {"share_of_the_way_to_the_text": self.prompt.share, "tokens_saved_per_request": self.tokens_saved}
        return own | {"nats_per_token_on_unrelated_text": self.damage[PROMPT]}

    def __str__(self) -> str:
        scores = [each for each in ("accuracy", "exact_match") if getattr(self.prompt, each) is not None]
        head = f"{'':{_NAME_WIDTH}} {'tokens':>7} {'KL, nats':>9} {'top-1':>6} {'share':>7}"
        lines = [head + "".join(f" {each.replace('_', ' '):>11}" for each in scores)]
        for each in self.readers:
            line = f"{each.name:{_NAME_WIDTH}} {each.tokens:7,.0f} {each.nats:9.4f} {each.agreement:6.3f}"
            line += f" {each.share:7.1%}"
            lines.append(line + "".join(f" {getattr(each, name):11.3f}" for name in scores))
        pays = "never" if self.requests_to_pay is None else f"after {self.requests_to_pay:,.0f} requests"
        lines += [
            f"{self.questions:,} questions ({', '.join(self.kinds)}), {self.answer_tokens:,} tokens of answers",
            f"saves {self.tokens_saved:,.0f} tokens a request, {self.bytes_saved / 2**20:,.2f} MiB of keys and "
            f"values; has paid {pays}",
            f"unrelated questions ({self.unrelated}): "
            + ", ".join(f"{value:.4f} nats with {name}" for name, value in self.damage.items()),
        ]
        return "\n".join(lines)


NOTHING, PROMPT, WHOLE = "no text", "the prompt", "the whole text"


def report_of(
    distilled: Distilled,
    questions: Sequence[Question],
    *,
    unrelated: DataSource | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> DistillationReport:
    """Measure a distilled prompt on the questions that were kept apart.

    Args:
        distilled: The prompt, its teacher, and what was kept apart.
        questions: All questions of the run, answered.
        unrelated: Records with answers that have nothing to do with the text; None takes a few of our own.
        check_stop: Called between passes.

    Raises:
        DataError: No question was kept apart.
    """
    held_out, teacher, tuned = distilled.held_out, distilled.teacher, distilled.tuned
    if not held_out.questions:
        raise DataError("no question was kept apart, so there is nothing to measure on; give questions=...")
    label_ids = tuned.label_ids(tuned.labels) if tuned.labels else []
    measure = _Measure(teacher, held_out, tuned.engine, label_ids, check_stop)
    prompt, length = tuned.prompt(), tuned.prompt().tokens
    bare = measure.reader(NOTHING, 0.0, held_out.with_prompt(None), 0.0)
    readers = [replace(bare, share=0.0)]
    for name, texts in (
        (f"its first {length} tokens", [each.ids[:length] for each in teacher.passages]),
        (f"a summary, {length} tokens", _summaries(teacher, length)),
    ):
        if texts:
            prompts = [teacher.with_ids(ids).prompt() for ids in texts]
            readers.append(measure.reader(name, measure.mean(texts), held_out.with_text(prompts), bare.nats))
    readers.append(measure.reader(PROMPT, length, held_out.with_prompt(prompt), bare.nats))
    text_tokens = measure.mean([each.ids for each in teacher.passages])
    readers.append(Reader(WHOLE, text_tokens, 0.0, 1.0, 1.0, *measure.right(held_out.with_text(teacher.prompts))))
    others = _unrelated(distilled, unrelated, check_stop)
    rows = {PROMPT: others.with_prompt(prompt), WHOLE: others.with_text(teacher.prompts)}
    shape = teacher.base.key_value_shape
    each_token = shape.layers * 2 * shape.heads * shape.width * teacher.base.model.dtype.itemsize
    saved, read = text_tokens - length, _tokens_read(distilled, questions)
    return DistillationReport(
        questions=len(held_out.questions),
        kinds=tuple(sorted({each.kind for each in held_out.questions})),
        answer_tokens=sum(len(each) for each in held_out.targets),
        readers=tuple(readers),
        tokens_saved=saved,
        bytes_saved=saved * each_token,
        tokens_read=read,
        requests_to_pay=read / saved if saved > 0 else None,
        damage={name: measure.divergence(own, others).nats for name, own in rows.items()},
        unrelated=len(others.questions),
    )


def measured_on(
    tuned: TunedPrompt,
    teacher: Teacher,
    questions: Sequence[Question],
    *,
    top_k: int = TOP_K,
) -> Distilled:
    """Return a prompt with questions to measure it on; the teacher answers those that have no answer.

    Args:
        tuned: The prompt.
        teacher: The base that has read the text.
        questions: Questions that nothing was trained on.
        top_k: Most likely tokens that are compared.
    """
    answered = teacher.answered(questions, scored=False)
    asked, rows = _rows(answered, teacher, tuned)
    targets = teacher.targets(answered, asked, top_k, lambda: None)
    return Distilled(tuned, teacher, HeldOut(answered, asked, rows, targets))


def _rows(
    questions: Sequence[Question], teacher: Teacher, tuned: TunedPrompt
) -> tuple[Sequence[TokenRow], Sequence[TokenRow]]:
    """Return the rows of answered questions as the teacher and as the student read them."""
    records = [each.record(chat=teacher.manifest.chat) for each in questions]
    return teacher.rows.tokenize(records)[0], tuned.rows.tokenize(records)[0]


@final
@dataclass(frozen=True, slots=True)
class _Measure:
    teacher: Teacher
    held_out: HeldOut
    engine: Engine
    label_ids: Sequence[tuple[int, ...]]
    check_stop: Callable[[], None]

    def reader(self, name: str, tokens: float, rows: Sequence[EngineRow], bare: float) -> Reader:
        found = self.divergence(rows, self.held_out)
        share = 1 - found.nats / bare if bare else 0.0
        return Reader(name, tokens, found.nats, found.agreement, share, *self.right(rows))

    def mean(self, texts: Sequence[Sequence[int]]) -> float:
        """Return the mean length of the texts that the questions are about."""
        return sum(len(texts[each.passage]) for each in self.held_out.questions) / len(self.held_out.questions)

    def right(self, rows: Sequence[EngineRow]) -> tuple[float | None, float | None]:
        """Return accuracy, where there are labels, and else exact match, of the answers that were given."""
        labels = self.teacher.manifest.labels
        given = [each.answer if each.labelled else None for each in self.held_out.questions]
        both = zip(rows, given, strict=True)
        pairs = [(row, text) for row, text in both if text is not None and (labels is None or text in labels)]
        if not pairs:
            return None, None
        if labels is None:
            how, decode = self.teacher.greedy, self.teacher.rows.decode
            asked = [Request(row.source, row.prompt, row.at, how, decode=decode) for row, _ in pairs]
            return None, text_metrics([text for _, text in pairs], self.teacher.texts(asked)).exact_match
        whole = [replace(row, target=tuple(ids)) for row, _ in pairs for ids in self.label_ids]
        size = rows_of_whole_inputs(self.teacher.batch_size, len(self.label_ids))
        scores = score_rows(self.engine, whole, max_rows=size).view(len(pairs), -1)
        right = scores.argmax(dim=1) == scores.new_tensor([labels.index(text) for _, text in pairs])
        return float(right.double().mean()), None

    def divergence(self, rows: Sequence[EngineRow], kept: HeldOut) -> Divergence:
        size = self.teacher.batch_size
        return divergence_of(self.engine, rows, kept.targets, batch_size=size, check_stop=self.check_stop)


def _summaries(teacher: Teacher, length: int) -> list[tuple[int, ...]]:
    """Return the base's own summary of each passage, at most ``length`` tokens; none where it cannot be asked."""
    chat, fields = teacher.manifest.chat, teacher.manifest.fields
    if (not chat and fields != (INPUT,)) or teacher.manifest.labels is not None:
        return []
    text = _SUMMARY.format(max(1, int(_WORDS_PER_TOKEN * length)))
    options = GenerationOptions(max_new_tokens=length)
    asked = [
        (Question(request_of(text, chat=chat), None, passage), options) for passage in range(len(teacher.passages))
    ]
    return [tuple(teacher.rows.text(each))[:length] for each in teacher.generate(asked)]


def _tokens_read(distilled: Distilled, questions: Sequence[Question]) -> float:
    """Return about how many tokens the run read, as ``DistillationReport`` counts them."""
    metrics = distilled.tuned.metrics
    trained = metrics.get("tokens_per_second", 0.0) * metrics.get("seconds_by_part", {}).get("training", 0.0)
    return float(2 * trained + tokens_read(questions, distilled.teacher))


def unrelated_pairs(source: DataSource) -> list[tuple[str, str]]:
    """Read unrelated questions with their answers.

    Raises:
        DataError: They cannot be read, or one is no text.
    """
    records = read_records(source)
    for number, each in enumerate(records, start=1):
        if not each.fields:
            raise DataError(f"unrelated question {number}: expected a text and its answer; give input and output")
    return [(next(iter(each.fields.values())), each.target or "") for each in records]


def _unrelated(distilled: Distilled, source: DataSource | None, check_stop: Callable[[], None]) -> HeldOut:
    """Return unrelated questions with what the bare base predicts for their answers."""
    teacher, tuned = distilled.teacher, distilled.tuned
    chat, fields = teacher.manifest.chat, teacher.manifest.fields
    pairs: Sequence[tuple[str, str]] = UNRELATED
    if source is not None:
        pairs = unrelated_pairs(source)
    questions = [
        Question(request_of(text, chat=True) if chat else dict.fromkeys(fields, text), answer)
        for text, answer in pairs
    ]
    asked, rows = _rows(questions, teacher, tuned)
    bare = [EngineRow(row.source, row.target, None) for row in rows]
    targets = targets_of(tuned.engine, bare, k=TOP_K, batch_size=teacher.batch_size, check_stop=check_stop)
    return HeldOut(questions, asked, rows, targets)
