"""Reading weights that may be damaged or hostile, and writing that a crash cannot leave half done.

What ``torch.save`` wrote is read in ``pickled``. What is written is fsynced
under a temporary name on the same file system, then renamed. A new folder appears in one rename. An existing one is
exchanged in one step, so that a kill leaves the old prompt or the new one. Where that cannot be done (see
``_exchanged_files``) each file is replaced by one rename: a failure puts those replaced back, a kill does not.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from softprompt.artifacts.lock import STATE_DIRECTORY, refuse_running
from softprompt.errors import ArtifactError, OutputExistsError
from softprompt.untrusted import (  # some for the door alone
    MOST_DEPTH,
    MOST_HEADER_BYTES,
    MOST_TEXT_BYTES,
    MOST_VIRTUAL_TOKENS,
    check_plain,
    parse_object,
    read_bytes,
    say_if_large,
)

__all__ = ["MOST_DEPTH", "MOST_TEXT_BYTES", "MOST_VIRTUAL_TOKENS"]
__all__ += ["check_plain", "parse_object", "read_bytes", "say_if_large"]

_MOST_LINKED = 1_000
"""Other files and folders that an exchanged folder may hold; more take too long to link."""


def load_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the content of a ``.safetensors`` file.

    Raises:
        ArtifactError: it is damaged.
    """
    try:
        if int.from_bytes(data[:8], "little") > MOST_HEADER_BYTES:
            raise ValueError(f"its header is larger than {MOST_HEADER_BYTES:,} bytes")
        return tensors_from_bytes(data)
    # A damaged header can fail in the parser, in the dtype table or in torch.
    except Exception as error:
        raise damaged(path, len(data), error) from error


def damaged(path: Path, size: int, error: Exception) -> ArtifactError:
    """Return the error for weights that cannot be parsed; ``size`` in bytes."""
    reason = " ".join(str(error).split())[:120]
    return ArtifactError(
        f"expected whole weights in {path}, the file is truncated or damaged ({size:,} bytes; "
        f"{reason}): copy it again from the original"
    )


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace the file at ``path`` by ``data`` (text as UTF-8), or leave it exactly as it was.

    Raises:
        OSError: the file system refused.
    """
    temporary = _temporary_beside(path)
    try:
        _write_synced(temporary, data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove what writing by the functions here left of unfinished files and folders where it was killed."""
    for path in directory.glob(".*.tmp") if directory.is_dir() else ():
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name):
            is_folder = path.is_dir() and not path.is_symlink()  # what a link leads to is not ours
            shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)


def require_new_file(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be written at ``path``.

    Raises:
        OutputExistsError: a folder is there, or a file that may not be overwritten.
    """
    if path.is_dir():
        raise OutputExistsError(f"expected an output file, {path} is a folder: name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(
            f"expected a new output file, {path} exists: choose another one, or pass --overwrite "
            "(overwrite=True in Python)"
        )


def require_empty(directory: Path, *, overwrite: bool = False) -> None:
    """Check that ``directory`` may be written to: it is absent, or an empty folder, with ``overwrite`` any folder.

    Raises:
        OutputExistsError: it is a file, or holds something.
    """
    require_no_file(directory)
    found = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() and not overwrite else []
    if found:
        raise OutputExistsError(
            f"expected a new or empty output directory, {directory} holds {len(found)} "
            f"entries ({', '.join(found[:3])}{', …' if len(found) > 3 else ''}): choose "
            "another one, or pass --overwrite (overwrite=True in Python)"
        )


def require_no_file(directory: Path) -> None:
    """Check that no file is where a folder is to be written, overwriting or not.

    Raises:
        OutputExistsError: there is one.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise OutputExistsError(f"expected an output directory, {directory} is a file: choose another path")


def write_folder(directory: Path, files: Mapping[str, bytes], stale: Iterable[str] = ()) -> None:
    """Write all of ``files`` (name to bytes) into ``directory``, or change nothing.

    Args:
        directory: made when it is absent; other files in it stay.
        files: replaced in this order.
        stale: names to remove, because they would contradict the new files.

    Raises:
        OutputExistsError: a run is at work there.
        OSError: the file system refused; what was there before is whole.
    """
    refuse_running(directory, but_own=True)
    if directory.is_dir():
        remove_leftovers(directory)
        gone = [name for name in stale if name not in files]
        if not _exchanged_files(directory.resolve(), files, gone):
            _replace_files(directory, files, gone)
        return
    with staged_folder(directory) as staged:
        for name, data in files.items():
            _write_synced(staged / name, data)


@contextmanager
def staged_folder(directory: Path) -> Iterator[Path]:
    """Yield a new folder, which replaces ``directory`` as a whole when the block ends without an error.

    The old ``directory`` is put back if the exchange fails.

    Raises:
        OutputExistsError: a run is at work there.
        OSError: the file system refused.
    """
    # Renaming a link would leave what it points to behind.
    directory = directory.resolve()
    refuse_running(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged, old = _temporary_beside(directory), _temporary_beside(directory)
    try:
        staged.mkdir()
        yield staged
        # Libraries write through temporary files that nobody else may read (0600); the umask says who may.
        for path in (each for each in staged.rglob("*") if each.is_file()):
            path.chmod(staged.stat().st_mode & 0o666)
        _sync_directory(staged)
        if not (directory.exists() and _exchanged(staged, directory)):
            if directory.exists():
                os.replace(directory, old)
            try:
                os.replace(staged, directory)
            except BaseException:
                if old.exists():
                    os.replace(old, directory)
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _sync_directory(directory.parent)


def _exchanged(staged: Path, directory: Path) -> bool:
    """Exchange two folders in one step, so that a kill leaves one of them under the name; False where none can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(staged), here, os.fsencode(directory), exchange) == 0


def _exchanged_files(directory: Path, files: Mapping[str, bytes], stale: Iterable[str]) -> bool:
    """Write files by exchanging the whole folder; False, and nothing is changed, where that cannot be done.

    Whatever else the folder holds is linked into the new one. It cannot be done where the file system has no
    exchange or no hard links, in a mounted folder, one of another owner or of many files, in the working directory,
    and in that of a run at work, which can be resumed.
    """
    beside, ours, link = _temporary_beside(directory), {*files, *stale}, partial(os.link, follow_symlinks=False)
    try:
        there = {path.name: path for path in directory.iterdir()}
        many = sum(1 for _ in itertools.islice(directory.rglob("*"), _MOST_LINKED + 1)) > _MOST_LINKED
        if many or not ours & set(there) or STATE_DIRECTORY in there or Path.cwd().is_relative_to(directory):
            return False
        beside.mkdir()
        if any(os.lstat(each).st_uid != beside.stat().st_uid for each in (directory, *there.values())):
            return False
        for name in there.keys() - ours:
            if there[name].is_dir() and not there[name].is_symlink():
                shutil.copytree(there[name], beside / name, symlinks=True, copy_function=link)
            else:
                link(there[name], beside / name)
        for name, data in files.items():
            _write_synced(beside / name, data)
        shutil.copystat(directory, beside)
        _sync_directory(beside)
        if not _exchanged(beside, directory):
            return False
        for path in beside.iterdir():  # what another process put there meanwhile
            if path.name not in there and path.name not in ours:
                os.replace(path, directory / path.name)
        _sync_directory(directory.parent)
    except OSError:
        return False
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def _replace_files(directory: Path, files: Mapping[str, bytes], stale: Iterable[str]) -> None:
    staged = {name: _temporary_beside(directory / name) for name in files}
    kept: dict[str, Path] = {}
    touched: list[str] = []
    try:
        for name, data in files.items():
            _write_synced(staged[name], data)
        for name in [*files, *stale]:
            if os.path.lexists(directory / name):
                backup = _temporary_beside(directory / name)
                kept[name] = backup
                shutil.copy2(directory / name, backup, follow_symlinks=False)
        for name, temporary in staged.items():
            os.replace(temporary, directory / name)
            touched.append(name)
        for name in stale:
            (directory / name).unlink(missing_ok=True)
            touched.append(name)
    except BaseException:
        # BaseException: Ctrl-C between two renames must not leave a mixed folder either.
        for name in touched:
            if name in kept:
                os.replace(kept[name], directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
        raise
    finally:
        for leftover in [*staged.values(), *kept.values()]:
            leftover.unlink(missing_ok=True)
    _sync_directory(directory)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(directory: Path) -> None:
    # Windows cannot open a folder; a rename there is durable without it.
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
