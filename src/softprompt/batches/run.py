"""`run_batch`: the driver of a batch. Ray Data reads, workers answer, finished parts are written as they come.

A part is one call of one worker, and one file. Ray restarts a worker that is lost, loads its base again and repeats
its parts; nothing is written but by the driver, so no part is lost or written twice. Workers are restarted without
end; a part that ends its worker each of ``RETRIES`` more times has errors for answers.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from softprompt.batches.parts import Parts, Row
from softprompt.batches.settings import BatchSettings
from softprompt.batches.worker import LINE, BatchTask, BatchWorker
from softprompt.errors import ConfigError, DataError, UsageError
from softprompt.progress import progress_bar

logger = logging.getLogger(__name__)

LOCAL = "local"
"""The address that starts Ray on this machine."""
RETRIES = 3
_AHEAD = 2
"""Parts that each worker has, so that it need not wait for the next."""
_READERS = {".jsonl": "read_text", ".json": "read_text", ".csv": "read_csv", ".parquet": "read_parquet"}


def run_batch(
    asked: BatchTask,
    data: Sequence[str],
    output: str | Path,
    settings: BatchSettings | None = None,
    *,
    address: str = LOCAL,
    resume: bool = False,
) -> dict[str, int]:
    """Answer all records of files and folders on a Ray cluster, and write the answers in their order.

    Args:
        asked: What is asked of each record.
        data: Files and folders of JSON lines, CSV or Parquet, all of one format, here or where Ray Data reads.
        output: The folder of the answers: ``part-000000.jsonl`` and so on.
        settings: How the batch is cut and computed.
        address: Ray's address; ``local`` starts it on this machine, ``auto`` finds the one that runs.
        resume: Go on with the batch in ``output``; finished parts are not computed again.

    Returns:
        The number of ``records``, ``parts``, of these the ``computed`` ones, and of ``errors`` among all records.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
        UsageError: There is another batch in the output, or none to resume.
        DataError: There is no data, or of several formats.
    """
    how = settings or BatchSettings()
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'softprompt[ray]'") from error
    paths, reader = _listed(data)
    listed = hashlib.sha256("\n".join(paths).encode()).hexdigest()
    plan = {
        "asked": asdict(asked),
        "data": list(data),
        "files": listed[:12],  # others would move the records behind them
        "part_size": how.part_size,
        "format": how.output_format,
    }
    parts = Parts.begun(Path(output), how.output_format, plan, resume=resume)
    with _connected(ray, address, how.workers):
        done, computed = _answered(ray, asked, _rows(ray, paths, reader, how.part_size), parts, how)
    errors = [row.get("error") is not None for row in parts.rows()]
    return {"records": len(errors), "parts": done, "computed": computed, "errors": sum(errors)}


def _answered(
    ray: Any, asked: BatchTask, read: Iterator[list[Row]], parts: Parts, how: BatchSettings
) -> tuple[int, int]:
    """Give the parts that are not there to the workers, and write each when it is done; return all, and these."""
    workers = _workers(ray, asked, how)
    running: dict[Any, tuple[int, int, int]] = {}  # a part's number, records and worker
    number = computed = 0
    with progress_bar(0, "part") as bar:

        def finish() -> int:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            part, size, worker = running.pop(ready)
            try:
                rows = ray.get(ready)
            except ray.exceptions.RayError as error:
                logger.warning("part %d was lost with its worker, or failed there; its records have errors", part)
                first, why = part * how.part_size + 1, f"the worker was lost or failed: {_cause(error)}"
                rows = [{"record": first + i, "error": why} for i in range(size)]
            parts.write(part, rows)
            bar.update()
            return worker

        for number, rows in enumerate(read, start=1):
            bar.total = number  # of those that have been read
            if parts.has(number - 1):
                bar.update()
                continue
            load = [sum(each[2] == i for each in running.values()) for i in range(len(workers))]
            worker = finish() if len(running) >= _AHEAD * len(workers) else load.index(min(load))
            answer = workers[worker].answer.remote(rows, (number - 1) * how.part_size + 1)
            running[answer] = (number - 1, len(rows), worker)
            computed += 1
        while running:
            finish()
    for each in workers:
        ray.kill(each)
    return number, computed


def _workers(ray: Any, asked: BatchTask, how: BatchSettings) -> list[Any]:
    """Return the workers, all with their prompts loaded.

    Raises:
        ConfigError: One of them cannot load them.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus and not asked.reading.get("device"):
        asked = replace(asked, reading={**asked.reading, "device": "cuda:0"})  # Ray shows each its own
    made = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(BatchWorker)
    workers = [made.remote(asked) for _ in range(how.workers or gpus or len(ray.nodes()))]
    try:
        ray.get([each.ready.remote() for each in workers])
    except ray.exceptions.RayError as error:
        raise ConfigError(f"a worker could not load its prompts: {_cause(error)}") from error
    return workers


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _rows(ray: Any, paths: Sequence[str], reader: str, size: int) -> Iterator[list[Row]]:
    """Yield the records of the files in order, ``size`` at a time."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = getattr(ray.data, reader)(list(paths))
    for batch in dataset.iter_batches(batch_size=size, batch_format="pyarrow"):
        rows = batch.to_pylist()
        yield [{LINE: row["text"]} for row in rows] if reader == "read_text" else rows


def _listed(data: Sequence[str]) -> tuple[list[str], str]:
    """Return the files in order, those of a local folder by name, and the function of Ray Data that reads them."""
    paths = []
    for each in data:
        if os.path.isdir(each):
            found = sorted(str(path) for path in Path(each).rglob("*") if path.suffix.lower() in _READERS)
            paths += [os.path.abspath(path) for path in found]
        elif os.path.exists(each) or "://" in each:
            paths.append(each if "://" in each else os.path.abspath(each))
        else:
            raise DataError(f"{each} does not exist; name a file or a folder")
    forms = {_READERS.get(os.path.splitext(path)[1].lower()) for path in paths}
    if len(forms) != 1 or None in forms:
        raise DataError(
            f"expected files of one of {', '.join(_READERS)} in {', '.join(data)}, found {len(forms)} kinds"
        )
    return paths, str(forms.pop())


def prompts_in(folder: str, column: str | None) -> Mapping[str, str]:
    """Return the folder of one prompt by its name, or with a column those of all prompts in a folder.

    Raises:
        UsageError: There is none.
    """
    path = Path(folder)
    if column is None:
        return {path.name or "prompt": os.path.abspath(folder) if path.exists() else folder}
    found = {each.parent.name: str(each.parent.absolute()) for each in sorted(path.glob("*/adapter_config.json"))}
    if not found:
        raise UsageError(f"prompt_column chooses among the prompts in a folder, and {folder} has none")
    return found


@contextmanager
def _connected(ray: Any, address: str, workers: int | None) -> Iterator[None]:
    """Connect to Ray inside the context; one that was connected before stays so."""
    if ray.is_initialized():
        yield
        return
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:  # reading needs CPUs beside the workers'
        how |= {"num_cpus": (os.cpu_count() or 1) + (workers or 1), "include_dashboard": False}
    try:
        ray.init(**how)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"--ray {address}: {_cause(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
