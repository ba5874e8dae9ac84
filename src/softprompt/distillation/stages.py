"""The stages before training: the questions with their answers, and what the teacher predicts for these."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from softprompt.distillation import Question, Study, problem, seeds_of_kinds
from softprompt.errors import DataError
from softprompt.generation import Bounds
from softprompt.progress import progress_bar

if TYPE_CHECKING:
    from softprompt.data import TokenRow
    from softprompt.distillation import DistillSettings, Store, Teacher
    from softprompt.training import TopTargets

logger = logging.getLogger(__name__)

BLOCK = 32
"""Questions, or rows, after which a stage is saved."""

CheckStop = Callable[[], None]


def answered(given: Sequence[Question], teacher: Teacher, store: Store, check_stop: CheckStop) -> list[Question]:
    """Return given questions, those without an answer answered by the teacher; useless answers are left out.

    Raises:
        DataError: None is left.
    """
    saved = store.questions() or {"read": 0, "questions": [], "dropped": {}}
    found = [Question(**each) for each in saved["questions"]]
    dropped = Counter[str](saved["dropped"])
    with progress_bar(len(given), "question", done=saved["read"], delay=2.0) as bar:
        for start in range(saved["read"], len(given), BLOCK):
            check_stop()
            block = given[start : start + BLOCK]
            for each in teacher.answered(block):
                if not each.labelled and (reason := problem(each.answer or "")):
                    dropped[f"answers {reason}"] += 1
                else:
                    found.append(each)
            _save(store, found, dropped, read=start + len(block))
            bar.update(len(block))
    return _usable(found, dropped)


def studied(settings: DistillSettings, teacher: Teacher, store: Store, check_stop: CheckStop) -> list[Question]:
    """Return questions of self-study with their answers.

    Raises:
        DataError: None is left.
    """
    study = Study.of(settings, teacher.manifest.chat, len(teacher.passages))
    if saved := store.questions():
        study.drawn, study.dropped = saved["drawn"], Counter(saved["dropped"])
        study.questions = [Question(**each) for each in saved["questions"]]
    with progress_bar(sum(study.counts), "question", done=len(study.questions)) as bar:
        while seeds := study.wanted(BLOCK):
            check_stop()
            before = len(study.questions)
            asked = study.kept([each for each, _ in seeds], teacher.generate(seeds))
            study.add(teacher.answered(asked))
            _save(store, study.questions, study.dropped, drawn=study.drawn)
            bar.update(len(study.questions) - before)
    if len(study.questions) < sum(study.counts):
        logger.warning("self-study found %d of %d questions", len(study.questions), sum(study.counts))
    return _usable(study.questions, study.dropped)


def _save(store: Store, found: Sequence[Question], dropped: Counter[str], **position: object) -> None:
    values = {"questions": [asdict(each) for each in found], "dropped": dict(dropped)}
    store.save_questions(values | position)


def _usable(found: list[Question], dropped: Counter[str]) -> list[Question]:
    if dropped:
        counts = sorted(dropped.items())
        logger.info("left out: %s", ", ".join(f"{count:,} {what}" for what, count in counts))
    if all(each.held_out for each in found):
        raise DataError(
            "no question is left to train on: the base's own questions or answers are empty or repetitive; give "
            "questions with answers, or use another base"
        )
    return found


def taught(
    questions: Sequence[Question],
    rows: Sequence[TokenRow],
    k: int,
    teacher: Teacher,
    store: Store,
    check_stop: CheckStop,
) -> list[TopTargets]:
    """Return what the teacher predicts for the target tokens of each row, passage after passage.

    Args:
        questions: The questions of the rows.
        rows: The rows as the teacher reads them.
        k: Tokens kept for each.
        teacher: The teacher.
        store: Keeps what is done.
        check_stop: Called between passes.
    """
    lengths = [len(row.source) + len(row.target) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (questions[i].passage, lengths[i]))
    found: dict[int, TopTargets] = {}
    with progress_bar(len(rows), "row", delay=2.0) as bar:
        for block, start in enumerate(range(0, len(order), BLOCK)):
            part = order[start : start + BLOCK]
            targets = store.targets(block)
            if targets is None:
                targets = teacher.targets([questions[i] for i in part], [rows[i] for i in part], k, check_stop)
                store.save_targets(block, targets)
            found.update(zip(part, targets, strict=True))
            bar.update(len(part))
    return [found[i] for i in range(len(rows))]


def tokens_read(questions: Sequence[Question], teacher: Teacher) -> int:
    """Return about how many tokens a teacher runs for questions: to ask, to answer, and to predict.

    The text counts as often as a forest runs it: once for all that is written behind it where the decoder has room
    to keep it, and once in each pass that scores labels or predicts. Questions that were left out do not count.
    """
    chat, labels, bounds = teacher.manifest.chat, teacher.manifest.labels, Bounds()

    def rows_of(asked: Sequence[Question]) -> list[TokenRow]:
        return teacher.rows.tokenize([each.record(chat=chat) for each in asked])[0]

    def passes(size: int) -> int:
        order = sorted(each.passage for each in questions)
        blocks = (order[i : i + BLOCK] for i in range(0, len(order), BLOCK))
        return sum(texts[each] for own in blocks for i in range(0, len(own), size) for each in {*own[i : i + size]})

    rows, seeds = rows_of(questions), seeds_of_kinds(chat=chat)
    at = rows[0].at if rows else 0  # tokens before the text, which are run with it
    texts = Counter({number: at + each.tokens for number, each in enumerate(teacher.prompts)})  # 0 for any other
    own = [len(row.source) - at + len(row.target) - 1 for row in rows]  # nothing is predicted behind the last
    read, written = sum(own) + passes(2 * teacher.batch_size), list[int]()
    for kind, seed in seeds.items():
        if studied := [each for each in questions if each.kind == kind]:
            read += len(studied) * (len(rows_of([seed])[0].source) - at)
            read += sum(len(teacher.rows.text(each.text)) for each in studied)
            written += [each.passage for each in studied]
    if labels is None:
        left = [i for i, each in enumerate(questions) if not each.labelled]
        read, written = read + sum(own[i] for i in left), written + [questions[i].passage for i in left]
    else:
        more = sum(len(ids) - 1 for ids in teacher.tuned[0].label_ids(labels))
        read += sum(len(row.source) - at + more for row in rows)
        read += passes(max(1, 2 * teacher.batch_size // len(labels)) if at else BLOCK)  # in front it is kept
    fits = len(texts) <= bounds.max_prompts_resident and texts.total() <= bounds.max_prompt_tokens
    return read + sum(texts[each] for each in (set(written) if fits else written))
