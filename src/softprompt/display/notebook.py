"""What notebooks and interpreters show of an object: one line, or a small page of tables; all text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from softprompt.display.figures import png_of, training_figure
from softprompt.errors import ConfigError


def one_line(kind: str, *parts: object, **facts: Any) -> str:
    """Return ``Kind(part, name=value)``, leaving out what is None."""
    named = [f"{name}={_number(value)}" for name, value in facts.items() if value is not None]
    return f"{kind}({', '.join([*map(str, parts), *named])})"


def page(title: str, *parts: str) -> str:
    """Return parts in HTML under a title."""
    return f"<div><p><b>{escape(title)}</b></p>{''.join(parts)}</div>"


def table(rows: Iterable[Sequence[Any]] | Mapping[str, Any], head: Sequence[str] = ()) -> str:
    """Return a table in HTML: rows under a head, or names and values, without the values that are None."""
    if isinstance(rows, Mapping):
        rows = [(name.replace("_", " "), value) for name, value in rows.items() if value is not None]
    top = "".join(f'<th style="text-align: left">{escape(name)}</th>' for name in head)
    lines = [f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows]
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{''.join(lines)}</table>" if lines else ""


def curve_html(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the training curve in HTML; nothing where there is none to draw, or matplotlib is not installed."""
    try:
        image = png_of(training_figure(history))
    except ConfigError:
        return ""
    data = base64.b64encode(image).decode()
    return f'<img alt="loss by epoch" style="max-width: 640px" src="data:image/png;base64,{data}">'


def _cell(value: Any) -> str:
    side = "right" if isinstance(value, int | float) else "left"
    return f'<td style="text-align: {side}">{escape(_number(value))}</td>'


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
