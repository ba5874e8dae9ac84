from __future__ import annotations

import os
import sys

import pytest

from softprompt.artifacts import (
    files,
    remove_leftovers,
    require_empty,
    staged_folder,
    write_atomically,
    write_folder,
)
from softprompt.errors import OutputExistsError


def listing(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


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
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, {"a": b"1", "b": b"2"})
    assert listing(tmp_path) == {"a": b"old"}


def test_an_overwrite_replaces_removes_stale_and_keeps_the_rest(tmp_path):
    for name in ("a", "gone", "other"):
        (tmp_path / name).write_bytes(b"old")
    write_folder(tmp_path, {"a": b"1", "b": b"2"}, stale=["gone", "never there", "a"])
    assert listing(tmp_path) == {"a": b"1", "b": b"2", "other": b"old"}


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
