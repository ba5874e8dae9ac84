from __future__ import annotations

import subprocess
import sys

import pytest

from softprompt.display import training_curve
from softprompt.errors import ConfigError

HISTORY = [
    {
        "epoch": epoch,
        "update": 10 * epoch,
        "loss": 2.0 / epoch,
        "learning_rate": 0.05,
        "validation_loss": 2.2 / epoch,
        "validation_accuracy": accuracy,
    }
    for epoch, accuracy in enumerate([0.5, 0.8, 0.8, 0.7], start=1)
]


@pytest.fixture
def figures(monkeypatch):
    """Every figure saved, with its axes as drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    saved = []
    original = figure.Figure.savefig

    def remember(self, *args, **kwargs):
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", remember)
    return saved


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_the_png_shows_losses_accuracy_and_the_best_epoch(tmp_path, figures):
    path = tmp_path / "new" / "curve.png"
    training_curve(HISTORY, path, base_accuracy=0.45)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(path.read_bytes()) > 10_000
    assert figures[0].get_suptitle() == "Training curve"
    losses, accuracy = map(lines, figures[0].axes)
    assert list(losses["training loss"].get_ydata()) == [point["loss"] for point in HISTORY]
    assert list(losses["validation loss"].get_xdata()) == [1, 2, 3, 4]
    best = accuracy["best checkpoint (epoch 3: 80.0%)"]  # as accurate as epoch 2, less loss
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([3], [0.8])
    assert set(accuracy["accuracy without the prompt (45.0%)"].get_ydata()) == {0.45}


def test_the_first_of_equals_is_best(tmp_path, figures):
    points = [point | {"validation_loss": 1.0} for point in HISTORY]
    training_curve(points, tmp_path / "curve.png")
    assert "best checkpoint (epoch 2: 80.0%)" in lines(figures[0].axes[1])


def test_without_accuracy_the_lowest_validation_loss_is_best(tmp_path, figures):
    points = [
        {"epoch": epoch, "loss": 3.0, "validation": {"loss": loss}}
        for epoch, loss in enumerate([2.0, 1.5, 1.7], start=1)
    ]
    training_curve(points, tmp_path / "curve.png")
    (axis,) = figures[0].axes
    assert "best checkpoint (epoch 2: 1.500)" in lines(axis)


@pytest.mark.parametrize(
    "points",
    [
        HISTORY[:1],
        [{"epoch": 1, "loss": 1.0}],
        [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": None, "validation": None}],
    ],
)
def test_short_and_gappy_histories_are_drawn(tmp_path, points):
    pytest.importorskip("matplotlib")
    training_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5_000


def test_an_empty_history_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the history is empty"):
        training_curve([], tmp_path / "curve.png")


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a \.png file .*got curve\.pdf"):
        training_curve(HISTORY, tmp_path / "curve.pdf")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "softprompt\[plot\]"'):
        training_curve(HISTORY, tmp_path / "curve.png")


def test_matplotlib_is_imported_by_drawing_only_and_pyplot_never(tmp_path):
    pytest.importorskip("matplotlib")
    program = f"""
import sys
import softprompt.artifacts, softprompt.display
assert "matplotlib" not in sys.modules, "imported too early"
softprompt.display.training_curve([{{"epoch": 1, "loss": 1.0}}], {str(tmp_path / "c.png")!r})
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
