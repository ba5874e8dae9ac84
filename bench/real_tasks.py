"""Prompt tuning on public data and real models: the frozen base against the tuned prompt.

Every task has a fixed split (`real_data.py`): training sees the training rows, the best epoch is
chosen on the validation rows, the numbers are those of the test rows. A seed decides the initial
prompt and the order of the rows. Data and models are read from ``../shared``; a task whose files
are absent is skipped with a message.

    python bench/real_tasks.py [--only NAME ...] [--seeds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers as tf

import softprompt
from alone import alone
from quiet import quiet
from real_data import (
    G2P,
    AbsentError,
    Split,
    banking,
    british,
    demo_complaints,
    drops_r,
    present,
    raft,
    sms_spam,
    sst2,
)
from real_heads import HeadWork
from real_result import HEADER, Result, commonest_share, line, mean, sizes
from softprompt.backbone import facts_of, load_base
from softprompt.cli.demo import SETTINGS

SHARED = Path(__file__).parents[1].parent / "shared"
FIRST_SEED = 73
STORIES, DEMO = "models/stories260K", "demo"


@dataclass(frozen=True)
class Work:
    """A task for `softprompt.tune`.

    Attributes:
        base_model: Folder below ../shared, or ``demo``.
        splits: Reads the data; several splits are folds.
        tokens, init, text: The prompt and what it starts from.
        options: Other arguments of `softprompt.tune`.
        rate: Learning rate in units of the embedding rms; None is the one in ``options``, or the
            default.
        sees_input: Whether an encoder's prompt attends to the input.
    """

    base_model: str
    splits: Callable[[Path], list[Split]]
    tokens: int
    init: str
    options: Mapping[str, Any]
    text: str | None = None
    rate: float | None = None
    sees_input: bool = True

    def run(self, name: str, shared: Path, seeds: Sequence[int]) -> Result:
        """Tune and test once for each seed."""
        base_model = self.base_model
        if base_model != DEMO:
            base_model = str(present(shared / base_model))
        splits = self.splits(shared)
        rms = facts_of(load_base(base_model).model).embedding_rms
        rate = self.options.get("learning_rate")
        rate = rate if self.rate is None else self.rate * rms
        bases: list[softprompt.Report] = []
        tuned: list[list[softprompt.Report]] = []
        start = time.perf_counter()
        for seed in seeds:
            reports = []
            for split in splits:
                prompt = softprompt.tune(
                    base_model,
                    split.train,
                    split.validation or None,
                    tuning_config=self._prompt(),
                    seed=seed,
                    silence_progress_bars=True,
                    **{**self.options, "learning_rate": rate},
                )
                if seed == seeds[0]:
                    bases.append(softprompt.evaluate(prompt, split.test, without_prompt=True))
                reports.append(softprompt.evaluate(prompt, split.test))
            tuned.append(reports)
        seconds = (time.perf_counter() - start) / len(seeds)
        metric = "exact match" if bases[0].accuracy is None else "accuracy"
        return Result(
            name=name,
            base_model=Path(self.base_model).name,
            metric=metric,
            rows=sizes(splits),
            commonest=None if metric == "exact match" else commonest_share(splits),
            settings={
                "tokens": self.tokens,
                "init": self.init,
                "epochs": self.options["num_epochs"],
                "rate": round(prompt.metrics["learning_rate"] / rms, 3),
                "batch": self.options["batch_size"],
            },
            base=[_pooled(bases)],
            tuned=[_pooled(reports) for reports in tuned],
            base_perplexity=mean([report.perplexity or 0.0 for report in bases]),
            tuned_perplexity=[mean([r.perplexity or 0.0 for r in reports]) for reports in tuned],
            seconds=seconds,
        )

    def _prompt(self) -> dict[str, Any]:
        text = {} if self.text is None else {"prompt_tuning_init_text": self.text}
        return {
            "num_virtual_tokens": self.tokens,
            "prompt_tuning_init_method": self.init,
            "prompt_sees_input": self.sees_input,
        } | text


def _pooled(reports: Sequence[softprompt.Report]) -> float:
    """Return the share of right rows over all folds."""
    shares = [report.accuracy if report.exact_match is None else report.exact_match for report in reports]
    right = sum((share or 0.0) * report.rows for share, report in zip(shares, reports, strict=True))
    return right / sum(report.rows for report in reports)


def _labelled(
    splits: Callable[[Path], list[Split]],
    verbalizer: str,
    text: str,
    *,
    epochs: int = 10,
    batch: int = 16,
) -> dict[str, Work]:
    """Return the same task with the same settings on both small language models."""
    options = {
        "verbalizer": verbalizer,
        "num_epochs": epochs,
        "batch_size": batch,
        "task": "classification",
    }
    return {base: Work(base, splits, 20, "TEXT", options, text) for base in (STORIES, DEMO)}


def _demonstration() -> Work:
    """Return what `softprompt demo` does."""
    options = dict(SETTINGS)
    tuning = options.pop("tuning_config")
    return Work(
        DEMO,
        demo_complaints,
        tuning["num_virtual_tokens"],
        tuning["prompt_tuning_init_method"],
        options,
        tuning.get("prompt_tuning_init_text"),
    )


LABELLED = {
    "sms_spam": _labelled(sms_spam, "{{input}}\nLabel (ham or spam):", "Is this text message spam or ham? Label:"),
    # 40 rows are few: smaller batches and more epochs give it as many updates as the others.
    "raft": _labelled(
        raft,
        "{{input}}\nLabel:",
        "Is this tweet a complaint or no complaint? Label:",
        epochs=20,
        batch=4,
    ),
    "sst2": _labelled(sst2, "{{input}}\nSentiment:", "Is this film review positive or negative? Sentiment:"),
    "banking10": _labelled(banking, "{{input}}\nTopic:", "What is this question to the bank about? Topic:"),
}
SPELLING = {
    "task": "generation",
    "num_epochs": 15,
    "batch_size": 16,
    "max_source_length": 40,
    "max_target_length": 40,
}
BRITISH_R = partial(british, wanted=drops_r)
BRITISH_ALL = partial(british, wanted=lambda *_: True)
WORKS: dict[str, Work | HeadWork] = {
    "complaints-demo": _demonstration(),
    **{f"{name}-demo": works[DEMO] for name, works in LABELLED.items()},
    **{f"{name}-stories": works[STORIES] for name, works in LABELLED.items()},
    "british-r": Work(G2P, BRITISH_R, 1, "RANDOM", SPELLING, rate=2.0),
    "british-r-isolated": Work(G2P, BRITISH_R, 1, "RANDOM", SPELLING, rate=2.0, sees_input=False),
    "british-r-10": Work(G2P, BRITISH_R, 10, "RANDOM", SPELLING, rate=2.0),
    "british-all": Work(G2P, BRITISH_ALL, 1, "RANDOM", SPELLING, rate=2.0),
    "sst2-minilm": HeadWork(sst2),
    "sst2-minilm-isolated": HeadWork(sst2, sees_input=False),
    "banking10-minilm": HeadWork(banking),
}


def main() -> None:
    """Run the tasks and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=WORKS, nargs="+", help="these tasks alone")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each task")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of data and models")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    quiet()
    tf.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    results = []
    if not options.json:
        print(HEADER)
    for name in options.only or WORKS:
        try:
            result = WORKS[name].run(name, options.shared, seeds)
        except AbsentError as error:
            print(f"{name}: skipped, {error}", file=sys.stderr)
            continue
        results.append(asdict(result))
        if not options.json:
            print(line(result), flush=True)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    alone()
    main()
