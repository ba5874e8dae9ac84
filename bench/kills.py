"""`kill -9` at random moments, and what resuming makes of it: the prompt bit for bit, and all it says but times.

Compared with a run that was never killed: every tensor, every line of the log, `adapter_config.json`, the manifest,
and which files there are.

    python bench/kills.py --kills 50 --save-every 1

Each run is started, killed, resumed, killed again ... until it ends, in a process of its own; the moments are drawn
evenly over the time that a whole run takes, start and end included. A run that was killed before its first state is
started again, one that was killed behind its end is finished.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alone import alone
from softprompt.bundled import complaints
from softprompt.training import state_path, tune

TIMES = ("timestamp", "created", "seconds", "seconds_by_part", "tokens_per_second")
"""What differs from run to run, in the log and the manifest."""

SETTINGS: dict[str, Any] = {"num_epochs": 3, "batch_size": 4, "limit": 40, "silence_progress_bars": True}


def main(words: list[str] | None = None) -> int:
    """Kill and resume; return 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    logging.getLogger("softprompt").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # a process with threads cannot be forked
    options = SETTINGS | {"save_every": given.save_every, "seeds": given.seeds}
    draw, killed, resumed, anew, behind = random.Random(given.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        straight, output = Path(folder, "straight"), Path(folder, "killed")
        began = time.monotonic()
        ended(straight, options, seconds=None)
        whole = time.monotonic() - began
        while killed < given.kills:
            shutil.rmtree(output, ignore_errors=True)
            while not ended(output, options, seconds=draw.uniform(0, whole) if killed < given.kills else None):
                killed += 1
                if state_path(output).exists():
                    resumed += 1
                elif (output / "adapter_model.safetensors").exists():
                    behind += 1
                    break
                else:
                    anew += 1
            if wrong := differences(straight, output):
                print(f"after {killed} kills {', '.join(wrong)} differ")
                return 1
    print(f"{killed} kills: {resumed} resumed, {anew} started again, {behind} behind the end; all bit-identical")
    return 0


def ended(output: Path, options: dict[str, Any], *, seconds: float | None) -> bool:
    """Run, or go on, in a process of its own; return whether it ended before it was killed."""
    child = os.fork()
    if child == 0:
        try:
            if state_path(output).exists():
                tune(output=output, resume=True)
            else:
                tune("demo", complaints("train"), complaints("test"), output=output, **options)
        except BaseException as error:
            print(f"failed: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed")
    return os.WIFEXITED(status)


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs."""
    files = [sorted(path.relative_to(each) for path in each.rglob("*")) for each in (one, other)]
    tensors = [load_file(each / "adapter_model.safetensors") for each in (one, other)]
    same = {
        "files": files[0] == files[1],
        "prompts": tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0]),
    }
    for name in ("training_logs.jsonl", "adapter_config.json", "softprompt.json"):
        texts = [(each / name).read_text(encoding="utf-8") for each in (one, other)]
        parts = [text.splitlines() if name.endswith("l") else [text] for text in texts]
        said = [[timeless(json.loads(part)) for part in each] for each in parts]
        same[name] = said[0] == said[1]
    return [name for name, equal in same.items() if not equal]


def timeless(value: Any) -> Any:
    """Return what a file says without the times in it."""
    if isinstance(value, list):
        return [timeless(each) for each in value]
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in TIMES}
    return value


if __name__ == "__main__":
    alone()
    sys.exit(main())
