"""What goes where: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import click


def start_logging(*, quiet: bool) -> None:
    """Send softprompt's log lines to stderr, without the loading bars of transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    logger = logging.getLogger("softprompt")
    for old in [each for each in logger.handlers if isinstance(each, _ToStandardError)]:
        logger.removeHandler(old)
    logger.addHandler(_ToStandardError())
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def show(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result: as one JSON object, or as text for people."""
    click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else text)


def table(rows: Mapping[str, Any]) -> str:
    """Return names and values in two columns, leaving out what is None."""
    width = max(len(name) for name in rows)
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {_number(value)}"
        for name, value in rows.items()
        if value is not None
    )


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


class _ToStandardError(logging.Handler):
    """Writes to the stderr of the moment, so that a replaced one is honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; warnings say that they are."""
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        sys.stderr.write(f"{prefix}{record.getMessage()}\n")
