import re
from dataclasses import fields
from pathlib import Path

from softprompt.training import TuneSettings, TuningConfig
from softprompt.training.settings import RATE_PER_RMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_page_names_every_setting_with_its_default():
    for item in fields(TuneSettings):
        if item.name == "tuning_config":
            continue
        row = next(line for line in PAGE.splitlines() if re.match(rf"\|[^|]*`{item.name}`", line))
        cell = row.split("|")[3]
        shown = str(item.default).lower() if isinstance(item.default, bool) else str(item.default)
        assert item.default is None or shown.removesuffix(".0") in cell, row
    for item in fields(TuningConfig):
        assert f"`tuning_config.{item.name}`" in PAGE
    assert f"{RATE_PER_RMS} x embedding rms" in PAGE


def test_every_test_the_page_names_exists():
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("*/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 15
    for name in named:
        assert f"def {name}(" in source, name
    for name in re.findall(r"`((?:tests/\w+/)?test_\w+\.py)`", PAGE):
        assert list((ROOT / "tests").glob("*/" + name.rpartition("/")[2])), name
