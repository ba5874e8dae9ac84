"""A setting with another name: the earlier one is taken in Python, run files and commands, and warns once."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass

import click
import pytest

import softprompt
from softprompt.bundled import complaints
from softprompt.cli.options import Command, options_of
from softprompt.errors import ConfigError, UsageError
from softprompt.fields import from_mapping, say_renamed, setting
from softprompt.training import TuneSettings, read_run


@dataclass
class Kitchen:
    """Settings of which two were called otherwise."""

    seats: int = setting(4, "Seats.", formerly=("chair_count", "9.0"))
    open_late: bool = setting(False, "Late.", formerly=("night_shift", "9.0"))
    name: str | None = setting(None, "Name.")


@pytest.fixture(autouse=True)
def nothing_said():
    say_renamed.cache_clear()
    yield
    say_renamed.cache_clear()


def test_the_earlier_name_gives_the_same_and_warns_once():
    with pytest.warns(FutureWarning, match="^chair_count is seats now; version 9.0 takes the earlier name no"):
        assert from_mapping(Kitchen, {"chair_count": 7, "name": "x"}) == Kitchen(seats=7, name="x")
    with warnings.catch_warnings(action="error"):
        assert from_mapping(Kitchen, {"chair_count": 8}).seats == 8
        assert from_mapping(Kitchen, {"seats": 9, "open_late": True}).open_late


def test_both_names_at_once_are_refused():
    with pytest.raises(ConfigError, match="chair_count is the earlier name of seats, and both are given"):
        from_mapping(Kitchen, {"chair_count": 7, "seats": 7})


@pytest.mark.parametrize(
    ("words", "found", "names"),
    [
        (["--chair-count", "7"], {"seats": 7}, ["--chair-count is --seats now"]),
        (["--chair-count=7"], {"seats": 7}, ["--chair-count is --seats now"]),
        (["--night-shift"], {"open_late": True}, ["--night-shift is --open-late now"]),
        (["--no-night-shift"], {"open_late": False}, ["--no-night-shift is --no-open-late now"]),
        (["--seats=3", "--name", "chair-count"], {"seats": 3, "name": "chair-count"}, []),
        (["--name", "--chair-count"], {"name": "--chair-count"}, []),
        (["--seats", "3", "--", "--chair-count"], {"seats": 3, "rest": ("--chair-count",)}, []),
    ],
)
def test_options_by_their_earlier_names(words, found, names):
    @click.command(cls=Command)
    @options_of(Kitchen)
    @click.argument("rest", nargs=-1)
    def cook(**values):
        return values

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values = cook.main(words, standalone_mode=False)
    assert values == {"seats": None, "open_late": None, "name": None, "rest": (), **found}
    assert [str(each.message).partition(";")[0] for each in said] == names
    help_text = cook.get_help(click.Context(cook))
    assert "--seats" in help_text and "chair" not in help_text
    with pytest.raises(UsageError, match="--seats is given under its earlier name too"):
        cook.main(["--seats", "3", "--chair-count=3"], standalone_mode=False)


@pytest.fixture
def renamed_seed(monkeypatch):
    """Have the seed of a run be called otherwise in an earlier version."""
    field = TuneSettings.__dataclass_fields__["seed"]
    monkeypatch.setattr(field, "metadata", {**field.metadata, "formerly": ("dice", "9.0")})


@pytest.mark.usefixtures("renamed_seed")
def test_keywords_and_run_files_by_their_earlier_names(tmp_path):
    with pytest.warns(FutureWarning, match="dice is seed now"), pytest.raises(ConfigError, match="seed must be at"):
        softprompt.tune("demo", complaints("test"), dice=-5)
    say_renamed.cache_clear()
    (tmp_path / "run.toml").write_text("dice = 5\n")
    with pytest.warns(FutureWarning, match="dice is seed now"):
        assert read_run(tmp_path / "run.toml") == {"seed": 5}


def test_without_it_a_name_is_unknown():
    with pytest.raises(ConfigError, match="dice"):
        softprompt.tune("demo", complaints("test"), dice=5)


@pytest.mark.usefixtures("renamed_seed")
def test_a_sweep_goes_on_with_a_setting_by_its_earlier_name(tmp_path, monkeypatch):
    module = importlib.import_module("softprompt.training.sweeps.sweep")
    came = []

    def resumed(command, base_model, train_data, validation_data, target, options):
        came.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr(module, "resumed", resumed)
    with pytest.warns(FutureWarning, match="dice is seed now"), pytest.raises(ConfigError, match="enough"):
        softprompt.sweep(output=tmp_path, resume=True, dice=5)
    assert came == [{"seed": 5}]
