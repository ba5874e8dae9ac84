"""An inspection as files: the numbers, the figures, and one HTML page that holds all and loads nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.artifacts import require_empty, write_folder
from softprompt.display import (
    contest_figure,
    cosines_figure,
    drift_figure,
    layers_figure,
    norms_figure,
    png_of,
    tokens_figure,
    training_figure,
)
from softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from softprompt.inspection import Inspection

NUMBERS, PAGE = "inspection.json", "report.html"
_Drawings = Iterator[tuple[str, "Callable[[], Figure]"]]


def write_report(found: Inspection, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write ``inspection.json``, ``report.html`` and the figures as PNG files, all or nothing.

    Without matplotlib (extra ``plot``) there are no figures, and the page says so.

    Raises:
        OutputExistsError: The directory is not empty and ``overwrite`` is off.
    """
    target = Path(directory)
    if not overwrite:
        require_empty(target)
    figures: dict[str, bytes] = {}
    for name, draw in _drawings(found):
        try:
            figures[name] = png_of(draw())
        except SoftPromptError as error:
            found.missing["figures"] = str(error)
        except (TypeError, ValueError, KeyError) as error:  # a history that is not what training writes
            found.missing[f"figure {name}"] = f"it cannot be drawn ({error!r})"
    page = _page(found.to_dict(), {name: base64.b64encode(image).decode() for name, image in figures.items()})
    files = {f"{name}.png": image for name, image in figures.items()}
    files[NUMBERS] = json.dumps(found.to_dict(), indent=1, allow_nan=False).encode()
    # A file may hold half a character, which UTF-8 has no bytes for.
    files[PAGE] = page.encode(errors="replace")
    stale = [each.name for each in target.glob("*.png") if each.name not in files] if target.is_dir() else []
    write_folder(target, files, [name for name in stale if name.partition("_")[0].removesuffix(".png") in _NAMES])


_NAMES = ("training", "drift", "tokens", "attention", "contest", "norms", "cosines")
"""What the names of figures begin with."""


def _drawings(found: Inspection) -> _Drawings:
    """Yield each figure that there are numbers for, by its name."""
    if found.history:
        yield "training", lambda: training_figure(found.history)
    if (moved := found.drift) is not None:
        yield "drift", lambda: drift_figure(moved.epochs, moved.drift, moved.every)
    yield from _of_answers(found)
    for number, part in enumerate(found.values.values(), start=1):
        if (shell := part.shell) is not None:
            yield (
                f"norms_{number}",
                lambda part=part, shell=shell: norms_figure(part.geometry.norms, shell.quantiles),
            )
        if part.tokens > 1:
            yield f"cosines_{number}", lambda part=part: cosines_figure(part.cosines, part.every)


def _of_answers(found: Inspection) -> _Drawings:
    left, places = found.leave_one_out, found.attention or {}
    by_token = next(([layer.by_token for layer in mass.layers] for mass in places.values()), [])
    part = next((part for name, part in found.values.items() if name.startswith(found.task_name or name)), None)
    words = [row[0].token for row in part.nearest] if part is not None and part.nearest else []
    if left is not None or by_token:
        lost = {} if left is None else {"change": left.change, "error": left.standard_error, "every": left.every}
        title = "What each virtual token is for"
        yield "tokens", lambda: tokens_figure(title, words, attention=by_token, **lost)
    for place, mass in places.items():
        yield (
            f"attention_{place}",
            lambda place=place, mass=mass: layers_figure(
                [each.share for each in mass.layers],
                [(each.head_min, each.head_max) for each in mass.layers],
                [each.answering for each in mass.layers],
                mass.uniform,
                place,
            ),
        )
    if (versus := found.contest) is not None:
        results = {name: (each.won, each.lost) for name, each in versus.against.items()}
        yield "contest", lambda: contest_figure(results, versus.rows)


def _page(found: Mapping[str, Any], images: Mapping[str, str]) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"number": _number, "visible": lambda text: repr(text)[1:-1]}
    template = environment.from_string(Path(__file__).with_name(PAGE).read_text(encoding="utf-8"))
    return template.render(found=found, images=images)


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
