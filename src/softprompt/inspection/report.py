"""An inspection as files: the numbers, the figures, and one HTML page that holds all and loads nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt import display
from softprompt.artifacts import require_empty, write_folder
from softprompt.errors import SoftPromptError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from softprompt.inspection import Inspection

NUMBERS, PAGE = "inspection.json", "report.html"
_KINDS = ("training", "drift", "tokens", "attention", "contest", "norms", "cosines")
"""What the names of figures begin with."""


def write_report(found: Inspection, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write ``inspection.json``, ``report.html`` and the figures as PNG files, all or nothing.

    Without matplotlib (extra ``plot``) there are no figures, and the page says so.

    Raises:
        OutputExistsError: The directory is a file, or not empty and ``overwrite`` is off.
    """
    from jinja2 import Environment

    target = Path(directory)
    require_empty(target, overwrite=overwrite)
    figures: dict[str, bytes] = {}
    for name, draw in _drawings(found):
        try:
            figures[name] = display.png_of(draw())
        except SoftPromptError as error:
            found.missing["figures"] = str(error)
        except (TypeError, ValueError, KeyError) as error:  # a history that is not what training writes
            found.missing[f"figure {name}"] = f"it cannot be drawn ({error!r})"
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"number": _number, "visible": lambda text: repr(text)[1:-1]}
    template = environment.from_string(Path(__file__).with_name(PAGE).read_text(encoding="utf-8"))
    images = {name: base64.b64encode(image).decode() for name, image in figures.items()}
    files = {f"{name}.png": image for name, image in figures.items()}
    files[NUMBERS] = json.dumps(found.to_dict(), indent=1, allow_nan=False).encode()
    # A file may hold half a character, which UTF-8 has no bytes for.
    files[PAGE] = template.render(found=found.to_dict(), images=images).encode(errors="replace")
    write_folder(target, files, [each.name for kind in _KINDS for each in target.glob(f"{kind}*.png")])


def _drawings(found: Inspection) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield each figure that there are numbers for, by its name."""
    if found.history:
        begun = (found.summary.metrics or {}).get("start")
        start = begun if isinstance(begun, Mapping) else None  # a stranger's file says what it likes
        yield "training", partial(display.training_figure, found.history, start=start)
    if (moved := found.drift) is not None:
        yield "drift", partial(display.drift_figure, moved.epochs, moved.drift, moved.every, moved.kept)
    left, places = found.leave_one_out, found.attention or {}
    by_token = next(([layer.by_token for layer in mass.layers] for mass in places.values()), [])
    chosen = [part.nearest or () for name, part in found.values.items() if name.startswith(found.task_name or name)]
    words = [row[0].token for row in chosen[0]] if chosen else []
    if left is not None:
        lost = left.change, left.standard_error
        yield "tokens", partial(display.tokens_figure, words, *lost, attention=by_token, every=left.every)
    elif by_token:
        yield "tokens", partial(display.tokens_figure, words, attention=by_token)
    for place, mass in places.items():
        layers = [(each.share, (each.head_min, each.head_max), each.answering) for each in mass.layers]
        shares, heads, answering = zip(*layers, strict=True)
        yield f"attention_{place}", partial(display.layers_figure, shares, heads, answering, mass.uniform, place)
    if (versus := found.contest) is not None:
        results = {name: (each.won, each.lost) for name, each in versus.against.items()}
        yield "contest", partial(display.contest_figure, results, versus.rows)
    for number, part in enumerate(found.values.values(), start=1):
        if part.shell is not None:
            yield f"norms_{number}", partial(display.norms_figure, part.geometry.norms, part.shell.quantiles)
        if part.tokens > 1:
            yield f"cosines_{number}", partial(display.cosines_figure, part.cosines, part.every)


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
