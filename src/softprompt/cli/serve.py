"""``softprompt serve``."""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.options import Command, given, option, options_of, parts_of, start_logging, trust_option
from softprompt.errors import UsageError
from softprompt.generation import Bounds
from softprompt.server.settings import ServeSettings


@click.command("serve", cls=Command)
@options_of(ServeSettings, leave_out=("bounds",))
@options_of(Bounds)
@trust_option
@option("--quiet", is_flag=True, help="Show warnings and errors only.")
def command(*, quiet: bool, **options: Any) -> None:
    """Serve all prompts of a folder over an OpenAI-compatible HTTP API.

    Each prompt is a model, named after its folder, on one base model. SIGTERM and Ctrl-C let running
    answers finish.
    """
    options = given(options)
    bounds = Bounds(**parts_of(options, Bounds))
    settings = ServeSettings(bounds=bounds, **options)
    start_logging(quiet=quiet)
    try:
        from softprompt.server.app import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("softprompt", "torch", "transformers"):
            raise
        raise UsageError(
            f'serving needs {error.name}, it is not installed: pip install "softprompt[serve]"'
        ) from error
    serve(settings)
