"""`run_batch`: the driver of a batch. Ray Data reads, workers answer, finished parts are written as they come.

A part is one call of one worker, and one file. Ray restarts a worker that is lost, loads its base again and repeats
its parts; nothing is written but by the driver, so no part is lost or written twice. Workers are restarted without
end; a part that ends its worker again and again has errors for answers.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from softprompt.backbone import trusts_code
from softprompt.batches.parts import Parts, Row
from softprompt.batches.settings import BatchSettings
from softprompt.batches.worker import LINE, BatchTask, BatchWorker
from softprompt.cluster import LOCAL, cause_of, connected, workers_of
from softprompt.data import json_lines
from softprompt.errors import DataError, UsageError
from softprompt.progress import progress_bar

logger = logging.getLogger(__name__)

_AHEAD = 2
"""Parts that each worker has, so that it need not wait for the next."""
_FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_WRONG = "why the file cannot be read"
"""The column beside that of a line, empty where the file could be read."""
_PACKED = (".gz", ".zst")
"""What may stand behind the suffix of a text, which Ray Data unpacks by it."""


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
        data: Files and folders of JSON lines, JSON lists, CSV, TSV or Parquet, all of one format, here or where Ray
            Data reads; texts may be packed.
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
    paths, form = _listed(data)
    listed = hashlib.sha256("\n".join(paths).encode()).hexdigest()
    plan = {
        "asked": asdict(asked),
        "data": list(data),
        "files": listed[:12],  # others would move the records behind them
        "part_size": how.part_size,
        "format": how.output_format,
    }
    with connected(address, how.workers, parts="ray.data") as ray:
        parts = Parts.begun(Path(output), how.output_format, plan, resume=resume)
        told = replace(asked, reading={"trust_remote_code": trusts_code(), **asked.reading})
        with workers_of(ray, BatchWorker, how.workers, told, beside=1) as workers:
            done, computed = _answered(ray, workers, _rows(ray, paths, form, how.part_size), parts, how)
    errors = [row.get("error") is not None for row in parts.rows()]
    return {"records": len(errors), "parts": done, "computed": computed, "errors": sum(errors)}


def _answered(
    ray: Any, workers: Sequence[Any], read: Iterator[list[Row]], parts: Parts, how: BatchSettings
) -> tuple[int, int]:
    """Give the parts that are not there to the workers, and write each when it is done; return all, and these."""
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
                first, why = part * how.part_size + 1, f"the worker was lost or failed: {cause_of(error)}"
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
    if not number:
        raise DataError("the data: expected at least one record, got none")
    return number, computed


def _rows(ray: Any, paths: Sequence[str], form: str, size: int) -> Iterator[list[Row]]:
    """Yield the records of the files in order, ``size`` at a time; those of text as lines of JSON.

    Raises:
        DataError: A file cannot be read.
    """
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it would tell each step of reading
    logging.getLogger("ray.data._internal.progress").disabled = True  # and warn that its bars are off
    try:
        if form == ".parquet":
            dataset = ray.data.read_parquet(list(paths))
        else:
            dataset = ray.data.read_binary_files(list(paths), include_paths=True).flat_map(_lines)
        for batch in dataset.iter_batches(batch_size=size, batch_format="pyarrow"):
            rows = batch.to_pylist()
            if wrong := [why for row in rows if (why := row.pop(_WRONG, ""))]:
                raise DataError(wrong[0])
            yield rows
    except ray.exceptions.RayError as error:
        raise DataError(f"the data cannot be read: {cause_of(error)}") from error


def _lines(file: Row) -> list[Row]:
    if not file["bytes"].removeprefix(codecs.BOM_UTF8).strip():  # as the output of a job that found nothing
        return []
    try:
        return [{LINE: line, _WRONG: ""} for line in json_lines(file["bytes"], _unpacked_name(file["path"]))]
    except DataError as error:  # of an error Ray Data would say that it was one, and not which
        return [{LINE: "", _WRONG: str(error)}]


def _unpacked_name(path: str) -> str:
    name, end = os.path.splitext(os.path.basename(path))
    return name if end.lower() in _PACKED else name + end


def _listed(data: Sequence[str]) -> tuple[list[str], str]:
    """Return the files in order, those of a local folder by name, and the suffix that all of them have."""
    paths = []
    for each in data:
        if os.path.isdir(each):
            found = sorted(str(path) for path in Path(each).rglob("*") if _form(str(path)) in _FORMS)
            paths += [os.path.abspath(path) for path in found]
        elif os.path.exists(each) or "://" in each:
            paths.append(each if "://" in each else os.path.abspath(each))
        else:
            raise DataError(f"{each} does not exist; name a file or a folder")
    forms = {_form(path) for path in paths}
    if len(forms) != 1 or not forms <= set(_FORMS):
        there = ", ".join(sorted(forms)) or "none"
        raise DataError(f"expected files of one of {', '.join(_FORMS)} in {', '.join(data)}, found {there}")
    if packed := [path for path in paths if _form(path) == ".parquet" and not path.lower().endswith(".parquet")]:
        raise DataError(f"{packed[0]}: Parquet is packed inside; unpack the file around it")
    return paths, forms.pop()


def _form(path: str) -> str:
    return os.path.splitext(_unpacked_name(path))[1].lower()


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
