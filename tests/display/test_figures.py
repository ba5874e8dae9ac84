from __future__ import annotations

import subprocess
import sys

import pytest

from softprompt.display import contest_figure, drift_figure, sweep_figure, training_curve
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


def test_a_distillation_shows_its_divergence_from_before_the_first_update_on(tmp_path, figures):
    points = [{"epoch": n, "loss": 3.0, "validation": {"divergence": d}} for n, d in ((1, 0.5), (2, 0.3))]
    training_curve(points, tmp_path / "curve.png", start={"divergence": 0.2})
    shown = lines(figures[0].axes[0])
    drawn = shown["divergence from the text, kept apart"]
    assert drawn.get_xydata().tolist() == [[0, 0.2], [1, 0.5], [2, 0.3]]
    assert list(shown["training loss"].get_xdata()) == [1, 2]
    assert "best checkpoint (epoch 0: 0.200)" in shown


def test_the_drift_marks_the_epoch_that_was_kept():
    pytest.importorskip("matplotlib")
    drawn = lines(drift_figure([1, 2], [[0.1, 0.2], [0.3, 0.4]], kept=1).axes[0])
    assert set(drawn["kept: epoch 1"].get_xdata()) == {1}
    assert not any(name.startswith("kept") for name in lines(drift_figure([1], [[0.1]]).axes[0]))


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


def test_drawing_does_without_pyplot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    training_curve([{"epoch": 1, "loss": 1.0}], tmp_path / "curve.png")


@pytest.mark.slow
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


def test_a_contest_names_its_counts_and_no_zeros():
    pytest.importorskip("matplotlib")
    drawn = contest_figure({"zero-shot": (12, 0), "nearest words": (7, 3), "other": (0, 0)}, 20)
    (axis,) = drawn.axes
    assert [text.get_text() for text in axis.texts if text.get_text()] == ["12", "7", "3"]
    assert [bar.get_width() for bar in axis.patches] == [12, 7, 0, 0, -3, 0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["zero-shot", "nearest words", "other"]
    assert axis.get_xlabel() == "records, of 20"


def tried(name, method, rate, *points):
    """A candidate as ``sweep.json`` has it, with (steps, accuracy, loss) at the end of each rung."""
    measured = [
        {"steps": steps, "validation": {"accuracy": accuracy, "loss": loss}} for steps, accuracy, loss in points
    ]
    choice = {"method": method, "init": None, "length": 8, "learning_rate": "x1"}
    return {"name": name, "choice": choice, "learning_rate": rate, "points": measured}


@pytest.mark.parametrize(
    ("by", "label"), [("accuracy", "validation accuracy"), ("loss", "validation loss (nats per token)")]
)
def test_a_sweep_draws_each_candidate_by_its_rate_and_those_that_went_on_by_their_steps(by, label):
    pytest.importorskip("matplotlib")
    candidates = [
        tried("2", "prefix", 0.3, (10, 0.7, 0.9), (30, 0.9, 0.4)),
        tried("0", "prompt_tuning", 0.02, (10, 0.8, 0.8), (30, 0.85, 0.5)),
        tried("1", "prompt_tuning", 0.01, (10, 0.6, 1.1)),
        tried("3", "prefix", 3.0),
    ]
    drawn = sweep_figure({"by": by, "best": "2", "rungs": [10, 30], "candidates": candidates})
    rates, rungs = drawn.axes
    assert (rates.get_xlabel(), rates.get_ylabel()) == ("peak learning rate", label)
    assert (rungs.get_xlabel(), rates.get_title()) == ("optimizer steps", "all candidates, at step 10")
    assert [tick.get_text() for tick in rungs.get_xticklabels()] == ["10", "30"]
    assert [tick.get_text() for tick in rates.get_xticklabels()] == ["0.01", "0.02", "0.3"]
    shown = {each["name"]: [point["validation"][by] for point in each["points"]] for each in candidates}
    first = {
        name: lines(rates)[name].get_xydata().tolist() for name in ("prompt_tuning, 8 tokens", "prefix, 8 tokens")
    }
    assert first == {
        "prompt_tuning, 8 tokens": [[0.01, shown["1"][0]], [0.02, shown["0"][0]]],
        "prefix, 8 tokens": [[0.3, shown["2"][0]]],
    }
    *on, kept = rungs.get_lines()
    went = [[list(pair) for pair in zip((10, 30), shown[name], strict=True)] for name in ("2", "0")]
    assert [line.get_xydata().tolist() for line in on] == went
    assert kept.get_label() == f"kept: {shown['2'][1]:.3f}"
    assert kept.get_xydata().tolist() == [[30, shown["2"][1]]]
