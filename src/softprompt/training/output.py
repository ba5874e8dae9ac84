"""The output directory of a run: who may write to it, what an interrupted run left there, and how to go on with it.

While a run is at work it holds a lock on its output. Files that only a run itself reads again are sealed: they
carry the SHA-256 of their bytes, so that damage and edits do not pass.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from softprompt.artifacts import (
    LOCK_FILE,
    STATE_DIRECTORY,
    locked,
    read_bytes,
    refuse_running,
    remove_leftovers,
    require_empty,
    require_no_file,
    write_atomically,
)
from softprompt.errors import (
    ArtifactError,
    OutputExistsError,
    ProcessLostError,
    SoftPromptError,
    TrainingError,
    TrainingInterrupted,
    UsageError,
)
from softprompt.world import world

STATE_FILE = "state.safetensors"
PLAN_FILE = "plan.json"
"""What a run of another command than ``tune`` goes on by; its ``command`` names that."""
SEEDS_FOLDER = "seeds"
"""Folder in the output that keeps the prompts of the other seeds, each in a folder named by its seed."""
_OWN = (".json", ".jsonl", ".toml", ".safetensors", ".partial", ".tmp")

SEAL = {"sha256": "0" * 64}
"""What a file has in it (metadata of safetensors, the first key of JSON): where its digest will stand."""
_PLACE = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')  # within a text of JSON its quotes would be escaped
_COMMAND, _HEAD = re.compile(rb'"command": ?"(distill|sweep)"'), 4096


def state_path(output: Path) -> Path:
    """Return where an output directory keeps its resume state."""
    return output / STATE_DIRECTORY / STATE_FILE


def check_output(output: Path | None, *, overwrite: bool) -> None:
    """Refuse an output directory that could not be written to in the end.

    Raises:
        UsageError: there is nothing to overwrite.
        OutputExistsError: it holds something that would be lost.
        ArtifactError: it may not be written to.
    """
    if output is None:
        if overwrite:
            raise UsageError("overwrite has no meaning without output; name an output directory")
        return
    _require_writable(output)
    if overwrite:
        require_no_file(output)
        return
    if begun_by(output) is not None:
        raise OutputExistsError(
            f"{output} holds an interrupted run; continue it with --resume (resume=True in "
            "Python), or start again with --overwrite (overwrite=True)"
        )
    if (output / STATE_DIRECTORY).is_dir():
        with locked(output):  # unless a run begins there just now
            remove_state(output)  # one that was killed before its first state left nothing to continue
    remove_leftovers(output)
    require_empty(output)


def _require_writable(output: Path) -> None:
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    if place == output and not place.is_dir():
        return  # refused as a file, with another message
    if not place.is_dir():
        raise ArtifactError(
            f"expected an output directory, {output} lies in {place}: Not a directory; choose another path"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"expected an output directory that can be written to, {place} is read-only for this "
            "user; choose another path, or change its permissions"
        )


@contextmanager
def claimed(
    output: Path | None, *, overwrite: bool = False, resume: bool = False, dry_run: bool = False
) -> Iterator[None]:
    """Hold an output directory for one run; without ``resume`` it has to be one that can be written to in the end.

    Of several processes the first one does; in a dry run none.

    Raises:
        UsageError: There is nothing to overwrite, or the run is to go on and to start anew.
        OutputExistsError: It holds something that would be lost, or another run is at work there.
        ArtifactError: It may not be written to.
    """
    if resume and overwrite:
        raise UsageError("resume=True goes on with a run and overwrite=True starts anew; leave overwrite out")
    with ExitStack() as held:
        if not dry_run:
            world().from_main(lambda: held.enter_context(_claimed(output, overwrite=overwrite, resume=resume)))
        try:
            yield
            world().from_main(lambda: None)  # what the first one wrote is there for all when they return
        except ProcessLostError as error:  # whichever process is left says how to go on
            if output is None or begun_by(output) is None or (how := resume_command(output)) in str(error):
                raise
            raise ProcessLostError(f"{error}; rank 0 saved its state before, continue with: {how}") from error


@contextmanager
def _claimed(output: Path | None, *, overwrite: bool, resume: bool) -> Iterator[None]:
    if output is not None:
        for path in _led_away(output):
            raise OutputExistsError(f"{path} is a link or no ordinary file; remove it, or choose another output")
        refuse_running(output)
    if not resume:
        check_output(output, overwrite=overwrite)
    if output is None:
        yield
        return
    made = [path for path in (output, *output.parents) if not path.exists()]
    with locked(output):
        remove_leftovers(output)
        try:
            yield
        finally:
            if [path.name for path in _left(output)] == [LOCK_FILE]:
                remove_state(output)
            with suppress(OSError):
                for path in made:
                    path.rmdir()  # where nothing was written


def _led_away(output: Path) -> Iterator[Path]:
    """Yield what a run would write behind, where it came with a folder of somebody else."""
    state, seeds = output / STATE_DIRECTORY, output / SEEDS_FOLDER
    yield from (path for path in (state, seeds) if path.is_symlink())
    yield from (path for path in _left(output) if path.is_symlink() or path.is_dir() or path.is_fifo())
    yield from (path for path in (seeds.iterdir() if seeds.is_dir() else ()) if path.is_symlink())


def how_to_go_on(where: str, output: Path | None) -> str:
    """Return the sentence that ends an interrupted run: where it stopped, and what continues it."""
    if output is None:
        return f"training was stopped {where}; nothing is saved, since the run has no output directory"
    return f"training was stopped {where}; its state is saved, continue with: {resume_command(output)}"


def ended_by(error: TrainingInterrupted | ProcessLostError, message: str) -> SoftPromptError:
    """Return the error of a run that was stopped, or lost a process; the first one knows where it has saved it."""
    if isinstance(error, ProcessLostError):
        return ProcessLostError(f"{error}; {message}" if world().is_main else str(error))
    return TrainingInterrupted(message)


def resume_command(output: Path) -> str:
    """Return the command that continues the run that was interrupted in a folder."""
    return f"softprompt {begun_by(output) or 'tune'} --resume --output {shlex.quote(str(output))}"


def ensemble_command(output: Path, record: Mapping[str, Any]) -> str:
    """Return the command that lets the prompts of all seeds answer together."""
    others = [seed for seed, run in record["runs"].items() if "problem" not in run and seed != str(record["kept"])]
    folders = [output, *(output / SEEDS_FOLDER / seed for seed in others)]
    return f"softprompt classify {' '.join(shlex.quote(str(each)) for each in folders)} --data FILE"


def begun_by(output: Path) -> str | None:
    """Return the command of the run that was interrupted in a folder; None where there is none to continue."""
    with suppress(ArtifactError):
        head = read_bytes(state_path(output).with_name(PLAN_FILE), _HEAD, head=True)  # the text may be long
        if found := _COMMAND.search(head):
            return found[1].decode()
    return "tune" if state_path(output).exists() else None


def clear_state(output: Path) -> None:
    """Remove what an earlier run left in the state of an output directory, but for the lock."""
    # First what makes it an interrupted run, so that half of one is none.
    for name in (PLAN_FILE, STATE_FILE):
        state_path(output).with_name(name).unlink(missing_ok=True)
    for path in _left(output):
        if path.suffix in _OWN:
            path.unlink()


def remove_state(output: Path) -> None:
    """Remove the resume state of a finished run; a kill leaves all of it, or none that could be resumed."""
    gone = output / f"{STATE_DIRECTORY}.{secrets.token_hex(4)}.tmp"
    with suppress(OSError):
        os.replace(output / STATE_DIRECTORY, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _left(output: Path) -> list[Path]:
    directory = output / STATE_DIRECTORY
    return list(directory.iterdir()) if directory.is_dir() else []


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file that holds ``SEAL`` atomically, its digest in that place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _with_digest(data, hashlib.sha256(data).hexdigest()))


def read_sealed(path: Path) -> bytes:
    """Return the bytes of a file of ``write_sealed``.

    Raises:
        TrainingError: It cannot be read, or is not as it was written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, str(error)) from error
    found = _PLACE.search(data)
    digest = hashlib.sha256(_with_digest(data, SEAL["sha256"])).hexdigest()
    if found is None or found[1].decode() != digest:
        raise damaged(path, "it is not as it was written, or of another version")
    return data


def damaged(path: Path, why: str) -> TrainingError:
    """Return the error for a file of the resume state that cannot be used."""
    return TrainingError(f"the resume state {path} is damaged ({why}); start again with overwrite=True")


def _with_digest(data: bytes, digest: str) -> bytes:
    found = _PLACE.search(data)
    return data if found is None else data[: found.start(1)] + digest.encode() + data[found.end(1) :]


@contextmanager
def kept_if_resumable(output: Path | None) -> Iterator[None]:
    """Leave nothing of a run that ends inside without a state it could be continued from.

    One whose numbers are not finite would fail again, so its state goes too.

    Raises:
        TrainingInterrupted: after a second Ctrl-C, where the state of the last epoch is there.
    """
    try:
        yield
    except TrainingInterrupted:
        raise
    except BaseException as error:
        if output is None:
            raise
        failed = isinstance(error, TrainingError)
        if state_path(output).exists() and not failed:
            if isinstance(error, KeyboardInterrupt):
                raise TrainingInterrupted(how_to_go_on("at once", output)) from None
            raise
        remove_state(output)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        raise
