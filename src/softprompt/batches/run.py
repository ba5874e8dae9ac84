"""`run_batch`: the driver of a batch. Ray Data reads, workers answer, finished parts are written as they come.

A part is one call of one worker, and one file. Ray restarts a worker that is lost, loads its base again and repeats
its parts; nothing is written but by the driver, so no part is lost or written twice. Workers are restarted without
end; a part that ends its worker again and again has errors for answers, until a resumption computes it again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from softprompt.backbone import trusts_code
from softprompt.batches.parts import LOST, Parts
from softprompt.batches.settings import BatchSettings
from softprompt.batches.worker import BatchTask, BatchWorker
from softprompt.cluster import LOCAL, cause_of, connected, workers_of
from softprompt.data import check_file, check_name, is_data_file, json_lines
from softprompt.errors import DataError, UsageError
from softprompt.progress import progress_bar

logger = logging.getLogger(__name__)

_AHEAD = 2
"""Parts that each worker has, so that it need not wait for the next."""
_LINE, _WRONG = "line", "why the file cannot be read"
"""The columns of what is read: a record as JSON, or what was wrong."""


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
        data: Files, also where Ray Data reads, and folders of files, of the formats of ``read_source``.
        output: The folder of the answers: ``part-000000.jsonl`` and so on.
        settings: How the batch is cut and computed.
        address: Ray's address; ``local`` starts it on this machine, ``auto`` finds the one that runs.
        resume: Go on with the batch in ``output``; finished parts are not computed again, lost ones are.

    Returns:
        The number of ``records``, ``parts``, of these the ``computed`` ones, and of ``errors`` among all records.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
        UsageError: There is another batch in the output, or none to resume.
        DataError: There is no data, or it or a part cannot be read; or no record has an answer.
    """
    how = settings or BatchSettings()
    paths = _listed(data)
    if any(Path(os.path.realpath(output)).is_relative_to(os.path.realpath(each)) for each in data):
        raise UsageError(f"the output {output} is in the data, and would be read as such; name another output")
    listed = hashlib.sha256("\n".join(paths).encode()).hexdigest()
    plan = {
        "asked": asdict(asked),
        "data": list(data),
        "files": f"{len(paths)} ({listed[:12]})",  # others would move the records behind them
        "part_size": how.part_size,
        "format": how.output_format,
    }
    parts = Parts.planned(Path(output), how.output_format, plan, resume=resume)
    told = replace(asked, reading={"trust_remote_code": trusts_code(), **asked.reading})
    try:
        with (
            connected(address, how.workers, parts="ray.data") as ray,
            workers_of(ray, BatchWorker, how.workers, told, beside=1) as workers,
        ):
            done, computed = _answered(ray, workers, _lines(ray, paths, how.part_size), parts, plan)
    except KeyboardInterrupt:
        if any(parts.rows()):
            logger.warning("what is finished stays in %s; --resume goes on with it", output)
        raise
    errors = [row["error"] for row in parts.rows()]
    if failed := [number for number, error in enumerate(errors, start=1) if error is not None]:
        where = f"record {failed[0]}: "
        first = where + errors[failed[0] - 1].removeprefix(where)
        if len(failed) == len(errors):
            raise DataError(f"no record has an answer; {first}; correct it, and name another output")
        logger.warning("%d of %d records have errors; %s", len(failed), len(errors), first)
    return {"records": len(errors), "parts": done, "computed": computed, "errors": len(failed)}


def _answered(
    ray: Any, workers: Sequence[Any], read: Iterator[list[str]], parts: Parts, plan: Mapping[str, Any]
) -> tuple[int, int]:
    """Give the parts that are not there to the workers, and write each when it is done; return all, and these."""
    running: dict[Any, tuple[int, int, int]] = {}  # a part's number, records and worker
    number, computed, most = 0, 0, plan["part_size"]
    with progress_bar(0, "part") as bar:

        def finish() -> int:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            part, size, worker = running.pop(ready)
            try:
                rows = ray.get(ready)
            except ray.exceptions.RayError as error:
                logger.warning("part %d was lost with its worker, or failed there; its records have errors", part)
                first, why = part * most + 1, f"{LOST}: {cause_of(error)}"
                rows = [{"record": first + i, "error": why} for i in range(size)]
            parts.write(part, rows)
            bar.update()
            return worker

        for number, lines in enumerate(read, start=1):
            if number == 1:
                parts.begin(plan)
            bar.total = number  # of those that have been read
            if parts.has(number - 1):
                bar.update()
                continue
            load = [sum(each[2] == i for each in running.values()) for i in range(len(workers))]
            worker = finish() if len(running) >= _AHEAD * len(workers) else load.index(min(load))
            answer = workers[worker].answer.remote(lines, (number - 1) * most + 1)
            running[answer] = (number - 1, len(lines), worker)
            computed += 1
        while running:
            finish()
    if not number:
        raise DataError("the data: expected at least one record, got none")
    return number, computed


def _lines(ray: Any, paths: Sequence[str], size: int) -> Iterator[list[str]]:
    """Yield the records of the files in order as lines of JSON, ``size`` at a time.

    Raises:
        DataError: A file cannot be read.
    """
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it would tell each step of reading
    logging.getLogger("ray.data._internal.progress").disabled = True  # and warn that its bars are off
    try:
        read = ray.data.read_datasource(_reader(ray)(list(paths)))
        for batch in read.iter_batches(batch_size=size, batch_format="pyarrow"):
            if wrong := [each for each in batch[_WRONG].to_pylist() if each]:
                raise DataError(wrong[0])
            yield batch[_LINE].to_pylist()
    except ray.exceptions.RayError as error:
        raise DataError(f"the data cannot be read: {cause_of(error)}") from error


def _reader(ray: Any) -> Any:
    """Return the class by which Ray Data reads files as they are; its own would unpack them without bounds."""

    class Files(ray.data.datasource.FileBasedDatasource):  # type: ignore[misc]
        def _open_input_source(self, filesystem: Any, path: str, **_: Any) -> Any:
            return filesystem.open_input_stream(path, compression=None)

        def _read_stream(self, f: Any, path: str) -> Iterator[Any]:
            return _blocks(json_lines(f.readall(), os.path.basename(path)))

    return Files


def _blocks(lines: Iterator[str]) -> Iterator[Any]:
    """Yield tables of the lines of a file, and of why it cannot be read further."""
    from pyarrow import table

    try:
        while some := list(islice(lines, 1000)):
            yield table({_LINE: some, _WRONG: [""] * len(some)})
    except DataError as error:  # of an error Ray Data would say that it was one, and not which
        yield table({_LINE: [""], _WRONG: [str(error)]})


def _listed(data: Sequence[str]) -> list[str]:
    """Return the files in order, those of a local folder by name."""
    paths = list[str]()
    for each in data:
        if os.path.isdir(each):
            found = [path for path in sorted(Path(each).rglob("*")) if path.is_file() and is_data_file(path.name)]
            if not found:
                raise DataError(f"{each}: expected data files in the folder, such as .jsonl or .csv, found none")
            paths += map(os.path.abspath, found)
        elif os.path.exists(each):
            check_file(Path(each))
            paths.append(os.path.abspath(each))
        elif "://" in each:
            paths.append(each)
        else:
            raise DataError(f"{each} does not exist; name a file or a folder")
    for path in paths:
        check_name(os.path.basename(path))
    return paths


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
