from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oracles.stored import drawn, folder
from softprompt.artifacts import (
    files,
    hub,
    locked,
    remove_leftovers,
    require_empty,
    staged_folder,
    write_atomically,
    write_folder,
)
from softprompt.cli.main import run
from softprompt.errors import OutputExistsError


def listing(directory, deep=False):
    found = directory.rglob("*") if deep else directory.iterdir()
    return {path.name: path.read_bytes() for path in found if not (deep and path.is_dir())}


def fail_on_call(monkeypatch, module, name, number):
    original, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


def test_write_atomically_writes_text_and_bytes(tmp_path):
    write_atomically(tmp_path / "a", "é")
    write_atomically(tmp_path / "a", "ü")
    write_atomically(tmp_path / "b", b"\x00")
    assert listing(tmp_path) == {"a": "ü".encode(), "b": b"\x00"}


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, broken):
    (tmp_path / "a").write_text("old")
    fail_on_call(monkeypatch, os, broken, 1)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", "new")
    assert listing(tmp_path) == {"a": b"old"}


def test_a_leftover_link_goes_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").touch()
    (tmp_path / ".state.0123abcd.tmp").symlink_to(tmp_path / "victim")
    (tmp_path / ".out.0123abcd.tmp" / "part").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"victim", "mine"}


def test_a_written_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_new_folder_appears_whole(tmp_path):
    write_folder(tmp_path / "deep" / "out", {"a": b"1", "b": b"2"})
    assert listing(tmp_path / "deep" / "out") == {"a": b"1", "b": b"2"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(("broken", "number"), [("fsync", 2), ("replace", 1)])
def test_a_failed_new_folder_leaves_nothing(tmp_path, monkeypatch, broken, number):
    fail_on_call(monkeypatch, os, broken, number)
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "out", {"a": b"1", "b": b"2"})
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("module", "broken", "number"),
    [
        (os, "fsync", 2),
        (os, "replace", 1),
        (os, "replace", 2),
        (os, "replace", 3),
        (files.shutil, "copy2", 2),
        (files.Path, "unlink", 1),
    ],
)
def test_a_failed_overwrite_leaves_the_old_folder(tmp_path, monkeypatch, module, broken, number):
    old = {"a": b"old a", "b": b"old b", "gone": b"old c", "other": b"kept"}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    fail_on_call(monkeypatch, module, broken, number)
    monkeypatch.setattr(files, "_exchanged_files", lambda *written: False)
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path, {"a": b"1", "b": b"2", "c": b"3"}, stale=["gone"])
    monkeypatch.undo()
    assert listing(tmp_path) == old


def test_an_interrupt_between_two_replacements_rolls_back(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    original = os.replace

    def interrupted(source, target):
        if str(target).endswith("b"):
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.setattr(files, "_exchanged_files", lambda *written: False)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, {"a": b"1", "b": b"2"})
    assert listing(tmp_path) == {"a": b"old"}


def test_an_overwrite_replaces_removes_stale_and_keeps_the_rest(tmp_path):
    for name in ("a", "gone", "other"):
        (tmp_path / name).write_bytes(b"old")
    write_folder(tmp_path, {"a": b"1", "b": b"2"}, stale=["gone", "never there", "a"])
    assert listing(tmp_path) == {"a": b"1", "b": b"2", "other": b"old"}


KILLED = """
import os, signal, sys
from pathlib import Path
from softprompt.artifacts import files

left, folder = int(sys.argv[1]), Path(sys.argv[2])

def killed(original):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call

for owner, name in ((os, "replace"), (os, "link"), (os, "unlink"), (Path, "unlink"), (os, "fsync"), (os, "rmdir"),
                    (files, "_exchanged")):
    setattr(owner, name, killed(getattr(owner, name)))
pid = os.fork()
written = {"weights": b"new", "config": b"new", "record": b"new"}
while True:
    if pid == 0:
        files.write_folder(folder / str(left), written, stale=["gone"])
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
    left += 1
    pid = os.fork()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_a_kill_anywhere_leaves_the_old_prompt_or_the_new_one(tmp_path):
    old = {"weights": b"old", "config": b"old", "record": b"old", "gone": b"old"}
    for number in range(40):
        (tmp_path / str(number) / "deep").mkdir(parents=True)
        for name, data in (old | {"mine": b"mine", "deep/mine": b"mine"}).items():
            (tmp_path / str(number) / name).write_bytes(data)
    subprocess.run([sys.executable, "-c", KILLED, "0", str(tmp_path)], check=True)
    news = 0
    for number in range(40):
        place = tmp_path / str(number)
        found = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
        assert found.pop("mine") == (place / "deep" / "mine").read_bytes() == b"mine"
        assert found in (old, dict.fromkeys(("weights", "config", "record"), b"new")), number
        news += found != old
    assert 0 < news < 40


def test_an_exchange_keeps_what_is_not_ours(tmp_path):
    place = tmp_path / "out"
    (place / "deep").mkdir(parents=True)
    place.chmod(0o750)
    for name in ("a", "mine", "deep/mine", ".a.0123abcd.tmp"):
        (place / name).write_bytes(b"old")
    (place / "link").symlink_to(tmp_path)
    os.mkfifo(place / "pipe")
    before = [(place / name).stat().st_ino for name in ("mine", "deep/mine")]
    write_folder(place, {"a": b"1", "b": b"2"})
    assert {path.name for path in place.iterdir()} == {"a", "b", "mine", "deep", "link", "pipe"}
    assert [(place / name).stat().st_ino for name in ("mine", "deep/mine")] == before
    assert (place / "link").is_symlink()
    assert (place / "a").read_bytes() == b"1"
    assert place.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_working_directory_stays_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.chdir(tmp_path)
    inode = os.stat(".").st_ino
    write_folder(Path("."), {"a": b"1"})
    assert (os.stat(tmp_path).st_ino, os.listdir(".")) == (inode, ["a"])


def test_what_comes_during_an_exchange_stays(tmp_path, monkeypatch):
    place, exchanged = tmp_path / "out", files._exchanged
    write_folder(place, {"a": b"old"})

    def meanwhile(staged, directory):
        (directory / "late").touch()
        return exchanged(staged, directory)

    monkeypatch.setattr(files, "_exchanged", meanwhile)
    write_folder(place, {"a": b"1"})
    assert listing(place) == {"a": b"1", "late": b""}


@pytest.fixture
def at_work(tmp_path):
    """Return a folder of a prompt in which another run is at work."""
    out = folder(tmp_path / "out", drawn(0))
    (out / ".state").mkdir()
    with (out / ".state" / "lock").open("w") as lock:
        lock.write("process 1 on another machine")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield out


def test_a_folder_that_a_run_is_at_work_in_is_not_written_to(at_work, tmp_path, capsys, monkeypatch):
    before = listing(at_work, deep=True)
    with pytest.raises(OutputExistsError, match=r"another run is at work in .*process 1 on another machine"):
        write_folder(at_work, {"a": b"1"})
    with pytest.raises(OutputExistsError, match="at work"), staged_folder(at_work):
        pass
    other = str(folder(tmp_path / "other", drawn(1)))
    monkeypatch.setattr(hub, "snapshot", lambda *names, **options: Path(other))
    for words in (["convert", other, str(at_work), "--to", "softprompt"], ["pull", "a/b", str(at_work)]):
        assert run([*words, "--overwrite"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another run is at work" in line
    assert listing(at_work, deep=True) == before


def test_the_run_itself_saves_into_its_folder(tmp_path):
    write_folder(tmp_path / "out", {"a": b"old"})
    with locked(tmp_path / "out"):
        write_folder(tmp_path / "out", {"a": b"1"})
        with pytest.raises(OutputExistsError, match="at work"), locked(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "a").read_bytes() == b"1"


def test_require_empty_accepts_absent_and_empty_folders(tmp_path):
    require_empty(tmp_path)
    require_empty(tmp_path / "absent")


def test_require_empty_refuses_a_folder_that_holds_something(tmp_path):
    for name in "abcd":
        (tmp_path / name).touch()
    with pytest.raises(OutputExistsError) as caught:
        require_empty(tmp_path)
    message = str(caught.value)
    assert "4 entries (a, b, c, …)" in message
    assert "--overwrite" in message
    assert "overwrite=True" in message


def test_require_empty_refuses_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="is a file"):
        require_empty(tmp_path / "file")


def test_a_staged_folder_takes_the_place_of_the_old_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with staged_folder(tmp_path / "out") as staged:
        (staged / "new").write_text("new")
        assert (tmp_path / "out" / "old").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_staged_folder_that_fails_changes_nothing(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(error), staged_folder(tmp_path / "out") as staged:
        (staged / "new").write_text("new")
        raise error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_when_the_exchange_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("refused")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    monkeypatch.setattr(files, "_exchanged", lambda *folders: False)
    with pytest.raises(OSError, match="refused"), staged_folder(tmp_path / "out") as staged:
        (staged / "new").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path, monkeypatch):
    place = tmp_path / "prompt"
    place.mkdir()
    (place / "old").touch()

    def killed(source, target):
        raise AssertionError("between two renames nothing is under the name")

    monkeypatch.setattr("os.replace", killed)
    with staged_folder(place) as staged:
        (staged / "new").touch()
    assert [each.name for each in place.iterdir()] == ["new"]
    assert [each.name for each in tmp_path.iterdir()] == ["prompt"]
