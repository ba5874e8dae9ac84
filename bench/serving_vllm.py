"""vLLM as a peer of `serving.py`: the same base, the same prompts as extra vocabulary.

`--vllm PROGRAM` exports them, starts the program and ends it; `--vllm URL` is one that serves the export of
`python bench/serving_vllm.py --model FOLDER --export EXPORT`. The clock of a server that was started here is the
seconds of CPU of its engine, without those of its HTTP server; that of one elsewhere is the wall's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from serving_work import OUTPUT, PROMPTS, VIRTUAL, Ask, Took, model_named, prompt_tables
from softprompt.artifacts.formats.extended_model import extend

_PORT = 8765
_WAIT = 1800
"""Seconds for a start: it reads the weights and measures its memory."""


def ids_of(vocabulary: int) -> dict[str, list[int]]:
    """Return the ids of each prompt's virtual tokens in an export."""
    return {str(number): [vocabulary + number * VIRTUAL + i for i in range(VIRTUAL)] for number in range(PROMPTS)}


def export(model: Any, tokenizer: Any, tables: Sequence[Tensor], folder: Path) -> None:
    """Save a copy of a model whose vocabulary has the prompts."""
    grown = copy.deepcopy(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    extend(grown, {str(number): table for number, table in enumerate(tables)}, ids_of(vocabulary))
    grown.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class VLLM:
    """A running vLLM server that serves the export."""

    def __init__(self, url: str, vocabulary: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._client = httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))
        self._ids = ids_of(vocabulary)
        self._bias = {str(token): -100 for ids in self._ids.values() for token in ids}

    def answered(self, ask: Ask) -> Took:
        """Ask for one answer and note when each token comes."""
        body = {
            "prompt": [*self._ids[str(ask.prompt)], *ask.ids],
            "max_tokens": OUTPUT,
            "temperature": 0,
            "ignore_eos": True,
            "logit_bias": self._bias,
            "stream": True,
            "return_token_ids": True,
        }
        began, took, ids = self.clock(), Took(), list[int]()
        with self._client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                new = json.loads(line[6:])["choices"][0].get("token_ids") or []
                took.times += [self.clock() - began] * len(new)
                ids += new
        took.ids = tuple(ids)
        return took


@contextmanager
def running(where: str, model: Any, tokenizer: Any, tables: Sequence[Tensor]) -> Iterator[VLLM]:
    """Give a server: the one at an address, or one that a program starts on an export made for it."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if where.startswith("http"):
        yield VLLM(where, vocabulary)
        return
    with tempfile.TemporaryDirectory() as folder:
        export(model, tokenizer, tables, Path(folder))
        dtype = str(model.dtype).removeprefix("torch.")
        words = [where, "serve", folder, "--port", str(_PORT), "--dtype", dtype, "--max-model-len", "512"]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        # Engine and worker in one process: in two, each waits busily for the other, which counts as work.
        words += ["--distributed-executor-backend", "uni"]
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                words,
                env={**os.environ, **settings, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{_PORT}"
            _until_ready(url, process, Path(log.name))
            yield VLLM(url, vocabulary, cpu_clock(below(process.pid)))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def below(parent: int) -> list[int]:
    """Return the processes that a process and those below it have started (Linux)."""
    found: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            found.setdefault(int(file.read_text().rpartition(")")[2].split()[1]), []).append(int(file.parent.name))
    own = found.get(parent, [])
    return own + [each for child in own for each in below(child)]


def cpu_clock(processes: Sequence[int]) -> Callable[[], float]:
    """Return a clock of the seconds of CPU that processes have had, all their threads together (Linux)."""
    clocks = [((~process) << 3) | 2 for process in processes]  # as clock_getcpuclockid of the C library makes them
    return lambda: sum(map(time.clock_gettime, clocks))


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _WAIT
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit(f"vLLM has not started: {log.read_text()[-3000:]}")


def main() -> None:
    """Export the base and prompts of the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, or a model's folder")
    parser.add_argument("--export", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    model, tokenizer = model_named(options.model)
    export(model, tokenizer, prompt_tables(model, PROMPTS), options.export)


if __name__ == "__main__":
    main()
