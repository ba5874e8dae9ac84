"""Several prompts together, and one prompt as the start of another, on the bundled model.

Ensemble: the README's run on the bundled complaints with several seeds; each member, the mean of
the members, both ways of combining them, and the plain average of their rows, on the test rows.
Start: SMS spam in few updates, from the complaints prompt of the same seed (SPoT), from RANDOM and
from a TEXT. Splits are those of `real_data.py`; nothing was chosen by looking at these results.

    python bench/transfer.py [--seeds 3] [--epochs 1 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers as tf

import softprompt
from alone import alone
from quiet import quiet
from real_data import AbsentError, Row, demo_complaints, sms_spam
from real_result import spread
from real_tasks import FIRST_SEED, LABELLED, SHARED

COMPLAINTS: dict[str, Any] = {
    "verbalizer": "Message: {{input}}\nLabel:",
    "num_epochs": 5,
    "batch_size": 16,
}
TOKENS = 20


def tuned(seed: int, split: Any, tuning: dict[str, Any], **options: Any) -> softprompt.TunedPrompt:
    """Tune one prompt on the bundled model."""
    prompt: softprompt.TunedPrompt = softprompt.tune(
        "demo",
        split.train,
        split.validation,
        seed=seed,
        tuning_config={"num_virtual_tokens": TOKENS, **tuning},
        silence_progress_bars=True,
        **options,
    )
    return prompt


def accuracy(subject: softprompt.TunedPrompt | softprompt.Ensemble, rows: list[Row]) -> float:
    """Return the share of right labels."""
    return softprompt.evaluate(subject, rows).accuracy or 0.0


def ensembles(seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Tune a member for each seed, save it, and measure them together."""
    (split,) = demo_complaints(folder)
    paths = [folder / str(seed) for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        tuned(seed, split, {}, **COMPLAINTS).save(path)
    members = softprompt.load_many(paths)
    found: dict[str, Any] = {"members": [accuracy(member, split.test) for member in members]}
    for combine in ("mean", "vote"):
        ensemble = softprompt.Ensemble(members, combine=combine)
        found[combine] = accuracy(ensemble, split.test)
    softprompt.average_prompts(paths, folder / "average")
    found["average of the rows"] = accuracy(softprompt.load(folder / "average"), split.test)
    return found


def starts(
    seeds: Sequence[int], epochs: Sequence[int], folder: Path, shared: Path
) -> dict[str, dict[int, list[float]]]:
    """Tune SMS spam from three starts, for each number of epochs and each seed."""
    (split,) = sms_spam(shared)
    work = LABELLED["sms_spam"]["demo"]
    found: dict[str, dict[int, list[float]]] = {}
    for count in epochs:
        options = {**work.options, "num_epochs": count}
        for seed in seeds:
            ways: dict[str, dict[str, Any]] = {
                "RANDOM": {},
                "TEXT": {
                    "prompt_tuning_init_method": "TEXT",
                    "prompt_tuning_init_text": work.text,
                },
                "PROMPT": {
                    "prompt_tuning_init_method": "PROMPT",
                    "prompt_tuning_init_prompt": str(folder / str(seed)),
                },
            }
            for name, tuning in ways.items():
                value = accuracy(tuned(seed, split, tuning, **options), split.test)
                found.setdefault(name, {}).setdefault(count, []).append(value)
                print(f"{name}, {count} epochs, seed {seed}: {value:.3f}", file=sys.stderr)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="members, and runs of each start")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3], help="of SMS spam")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of data and models")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    quiet()
    tf.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    with tempfile.TemporaryDirectory() as name:
        together = ensembles(seeds, Path(name))
        try:
            begun = starts(seeds, options.epochs, Path(name), options.shared)
        except AbsentError as error:
            print(f"SMS spam: skipped, {error}", file=sys.stderr)
            begun = {}
    if options.json:
        print(json.dumps({"ensemble": together, "starts": begun}, indent=2))
        return
    print("| complaints, test | accuracy |\n|---|---|")
    print(f"| one prompt | {spread(together.pop('members'))} |")
    for name, value in together.items():
        print(f"| {name} | {value:.3f} |")
    print("\n| SMS spam, start | " + " | ".join(f"{n} epochs" for n in options.epochs) + " |")
    print("|---|" + "---|" * len(options.epochs))
    for name, values in begun.items():
        print(f"| {name} | " + " | ".join(spread(each) for each in values.values()) + " |")


if __name__ == "__main__":
    alone()
    main()
