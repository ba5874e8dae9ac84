"""Public data sets as fixed splits: training, validation and test rows without common texts.

The draws are seeded and do not depend on the seed of a training run.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt.bundled import complaints

Row = dict[str, str]
INTENTS = 10
SST2_WORDS = 8
G2P = "models/g2p-bart-us-onevocab"


@dataclass(frozen=True)
class Split:
    """Rows of one task: training, validation (may be empty) and test."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


class AbsentError(Exception):
    """A file that a task reads is not there."""


def present(path: Path) -> Path:
    """Return the path if there is something."""
    if not path.exists():
        raise AbsentError(f"{path} is absent")
    return path


def balanced(rows: Iterable[Row], counts: Sequence[int]) -> list[list[Row]]:
    """Draw disjoint parts with the same number of rows of every label, in a fixed order."""
    by_label: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["output"], row["input"])):
        by_label.setdefault(row["output"], []).append(row)
    parts: list[list[Row]] = [[] for _ in counts]
    generator = random.Random(0)
    for label in sorted(by_label):
        drawn = generator.sample(by_label[label], len(by_label[label]))
        start = 0
        for part, count in zip(parts, counts, strict=True):
            end = start + count // len(by_label)
            part.extend(drawn[start:end])
            start = end
    for part in parts:
        generator.shuffle(part)
    return parts


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Keep one of rows with equal input, so that no text is in two parts."""
    return list({" ".join(row["input"].lower().split()): row for row in rows}.values())


def table(path: Path, source: str, target: str) -> Iterator[Row]:
    """Read a file with a header line."""
    with present(path).open(encoding="utf-8", newline="") as lines:
        records: Iterator[list[str]] = csv.reader(lines)
        if path.suffix == ".tsv":
            records = (line.rstrip("\r\n").split("\t") for line in lines)
        header = next(records)
        columns = header.index(source), header.index(target)
        for record in records:
            yield {"input": record[columns[0]].strip(), "output": record[columns[1]]}


def sms_spam(shared: Path) -> list[Split]:
    """Spam or ham, as many of each; texts that occur twice are taken once."""
    path = present(shared / "data/sms_spam/SMSSpamCollection")
    pairs = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = distinct({"input": text, "output": label} for label, text in pairs)
    train, validation, test = balanced(rows, (400, 100, 200))
    return [Split(train, validation, test)]


def raft(shared: Path) -> list[Split]:
    """RAFT's 50 labelled tweets in five folds; its test file has no labels."""
    path = shared / "data/raft_twitter_complaints/train.csv"
    rows = list(table(path, "Tweet text", "Label"))
    random.Random(0).shuffle(rows)
    folds = [rows[start::5] for start in range(5)]
    return [Split([row for other in folds if other is not fold for row in other], [], fold) for fold in folds]


def sst2(shared: Path) -> list[Split]:
    """Sentiment: training and validation from the training file, test from the dev file."""
    names = {"0": "negative", "1": "positive"}

    def read(name: str) -> list[Row]:
        rows = table(shared / f"data/sst2/{name}.tsv", "sentence", "label")
        return distinct(row | {"output": names[row["output"]]} for row in rows)

    test = balanced(read("dev"), (400,))[0]
    held_out = {row["input"].lower() for row in read("dev")}
    # The training file is of phrases; those of a few words say little.
    phrases = [row for row in read("train") if len(row["input"].split()) >= SST2_WORDS]
    rows = [row for row in phrases if row["input"].lower() not in held_out]
    train, validation = balanced(rows, (800, 200))
    return [Split(train, validation, test)]


def banking(shared: Path, intents: int = INTENTS, each: tuple[int, int, int] = (40, 10, 30)) -> list[Split]:
    """The first intents of Banking77's own list, with as many rows of each in training, validation and test."""
    folder = shared / "data/banking77"
    names = json.loads(present(folder / "categories.json").read_text(encoding="utf-8"))[:intents]

    def read(name: str) -> list[Row]:
        rows = table(folder / f"{name}.csv", "text", "category")
        kept = distinct(row for row in rows if row["output"] in names)
        return [row | {"output": row["output"].replace("_", " ")} for row in kept]

    test = balanced(read("test"), (each[2] * intents,))[0]
    held_out = {row["input"] for row in read("test")}
    rows = [row for row in read("train") if row["input"] not in held_out]
    train, validation = balanced(rows, (each[0] * intents, each[1] * intents))
    return [Split(train, validation, test)]


def boolq(shared: Path) -> list[Split]:
    """Yes or no about a passage: FewGLUE's 32 training rows, tested on rows of the official dev file."""

    def read(name: str) -> list[Row]:
        lines = present(shared / f"data/fewglue_32dev/BoolQ/{name}.jsonl").read_text("utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        texts = [f"{row['passage']}\nQuestion: {row['question']}?" for row in found]
        answers = ["yes" if row["label"] in (True, "true", "True") else "no" for row in found]
        return distinct({"input": text, "output": answer} for text, answer in zip(texts, answers, strict=True))

    return [Split(read("train"), read("dev32"), balanced(read("val"), (300,))[0])]


def e2e(shared: Path) -> list[Split]:
    """Facts about a restaurant to a sentence: the dev file's first for each, tested on the test file's."""

    def read(name: str) -> list[Row]:
        rows = list(distinct(reversed(list(table(shared / f"data/e2e_nlg/{name}.csv", "mr", "ref")))))
        return random.Random(0).sample(rows, len(rows))

    train = read("devset")
    known = {row["input"] for row in train}
    return [Split(train[:400], train[400:], [row for row in read("testset_w_refs") if row["input"] not in known])]


def gsm8k(shared: Path) -> list[Split]:
    """Word problems with their steps, without the calculator's marks."""

    def read(name: str) -> list[Row]:
        lines = present(shared / f"data/gsm8k/{name}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [{"input": row["question"], "output": re.sub("<<.*?>>", "", row["answer"])} for row in rows]

    train = read("train")
    return [Split(train[:-200], train[-200:], read("test"))]


def demo_complaints(_: Path) -> list[Split]:
    """The data set that the package ships, in its own split."""

    def read(name: str) -> list[Row]:
        return [json.loads(line) for line in complaints(name).read_text("utf-8").splitlines()]

    return [Split(read("train"), read("validation"), read("test"))]


def british(shared: Path, wanted: Callable[[str, str], bool]) -> list[Split]:
    """Spellings and British pronunciations that the American model has the symbols for."""
    config = json.loads(present(shared / f"{G2P}/config.json").read_text(encoding="utf-8"))
    phonemes, letters = set(config["phoneme_chars"]), set(config["grapheme_chars"])
    american, gold = (
        json.loads(present(shared / f"data/g2p_lexicon/{name}_gold.json").read_text("utf-8"))
        for name in ("us", "gb")
    )
    rows = distinct(
        {"input": word, "output": gold[word]}
        for word, sound in sorted(american.items())
        if isinstance(sound, str)
        and isinstance(gold.get(word), str)
        and set(gold[word]) <= phonemes
        and set(word) <= letters
        and wanted(sound, gold[word])
    )
    random.Random(0).shuffle(rows)
    return [Split(rows[:1200], rows[1200:1328], rows[1328:1628])]


def raises_schwa(american: str, gold: str) -> bool:
    """Tell whether the British form is the American one with the vowel of "kit" for at least one schwa."""
    return _differs(american, gold, "ə", "[əɪ]")


def drops_r(american: str, gold: str) -> bool:
    """Tell whether the British form is the American one with at least one ɹ left out."""
    return _differs(american, gold, "ɹ", "ɹ?")


def _differs(american: str, gold: str, sound: str, forms: str) -> bool:
    return gold != american and bool(re.fullmatch(re.escape(american).replace(sound, forms), gold))
