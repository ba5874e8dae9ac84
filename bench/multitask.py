"""Multitask prompt tuning on the bundled model: a source from two tasks, adapted to a third.

The source is trained on complaints and SST-2; the target is SMS spam with few rows. Each arm trains
the target's prompt for the same number of updates from another start; the best epoch is chosen on
validation rows, the numbers are those of test rows. Source training costs its own updates on top.

    python bench/multitask.py [--seeds 3] [--rows 40] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import softprompt
from alone import alone
from real_data import Row, demo_complaints, sms_spam, sst2

SHARED = Path(__file__).parents[1].parent / "shared"
MULTITASK = "MULTITASK_PROMPT_TUNING"
TOKENS, SOURCE_ROWS, TEST_ROWS, EPOCHS = 20, 200, 200, 8
TARGET = "Message: {{input}}\nLabel:"
VERBALIZERS = {"complaints": TARGET, "sst2": "Review: {{input}}\nSentiment:"}
COMMON: dict[str, Any] = {"batch_size": 16, "silence_progress_bars": True}


def few(rows: list[Row], count: int) -> list[Row]:
    """Return a fixed draw of rows."""
    return random.Random(0).sample(rows, min(count, len(rows)))


def train_source(folder: Path, seed: int) -> dict[str, Any]:
    """Train ``both`` in a folder of source prompts and return its metrics."""
    splits = {"complaints": demo_complaints(SHARED)[0], "sst2": sst2(SHARED)[0]}
    tuned = softprompt.tune(
        "demo",
        {name: few(split.train, SOURCE_ROWS) for name, split in splits.items()},
        {name: few(split.validation, 100) for name, split in splits.items()},
        output=folder / "both",
        tuning_type=MULTITASK,
        num_epochs=4,
        task_verbalizers=VERBALIZERS,
        tuning_config={"num_virtual_tokens": TOKENS, "prompt_tuning_init_method": "SAMPLE_VOCAB"},
        seed=seed,
        **COMMON,
    )
    return dict(tuned.metrics)


def arms(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of each start of the target's prompt."""
    plain = {"num_virtual_tokens": TOKENS}
    source = plain | {"prompt_tuning_init_source_model": "both"}
    multitask = {"tuning_type": MULTITASK, "source_prompt_base": str(folder)}
    return {
        "plain, RANDOM": {"tuning_config": plain},
        "plain, SAMPLE_VOCAB": {"tuning_config": plain | {"prompt_tuning_init_method": "SAMPLE_VOCAB"}},
        "multitask, AVERAGE_SOURCE": multitask
        | {"tuning_config": source | {"prompt_tuning_init_method": "AVERAGE_SOURCE"}},
        "multitask, ONLY_SOURCE_SHARED": multitask
        | {"tuning_config": source | {"prompt_tuning_init_method": "ONLY_SOURCE_SHARED"}},
        "multitask, SAMPLE_VOCAB": {
            "tuning_type": MULTITASK,
            "tuning_config": plain | {"prompt_tuning_init_method": "SAMPLE_VOCAB"},
        },
    }


def main() -> None:
    """Print a table of test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=40, help="training rows of the target")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    target = sms_spam(SHARED)[0]
    train, held_out = few(target.train, chosen.rows), few(target.validation, 100)
    test = few(target.test, TEST_ROWS)
    found: dict[str, list[float]] = {}
    sources = []
    for seed in range(73, 73 + chosen.seeds):
        with tempfile.TemporaryDirectory() as name:
            sources.append(train_source(Path(name), seed))
            for arm, settings in arms(Path(name)).items():
                tuned = softprompt.tune(
                    "demo",
                    train,
                    held_out,
                    verbalizer=TARGET,
                    num_epochs=EPOCHS,
                    seed=seed,
                    **COMMON,
                    **settings,
                )
                report = softprompt.evaluate(tuned, test)
                found.setdefault(arm, []).append(report.accuracy or 0.0)
    if chosen.json:
        print(json.dumps({"accuracy": found, "sources": sources}))
        return
    print(f"sms_spam, {len(train)} training rows, {len(test)} test rows, {chosen.seeds} seeds")
    for arm, values in found.items():
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"{arm:32} {fmean(values):.3f} ± {pstdev(values):.3f}  ({each})")
    for source in sources:
        print("source:", source["validation"], "teachers:", source["teachers"]["validation"])


if __name__ == "__main__":
    alone()
    main()
