"""``softprompt serve``."""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.options import given, options_of
from softprompt.cli.streams import start_logging
from softprompt.errors import UsageError
from softprompt.server.settings import ServeSettings


@click.command("serve")
@click.option("--base-model", required=True, help="Base model: folder, Hub id or 'demo'.")
@click.option("--prompts", required=True, help="Folder with one folder for each prompt.")
@options_of(ServeSettings, leave_out=("base_model", "prompts"))
@click.option("--quiet", is_flag=True, help="Show warnings and errors only.")
def command(*, quiet: bool, **options: Any) -> None:
    """Answer for every prompt in a folder over HTTP, as OpenAI's API does.

    Each prompt is a model by the name of its folder, all over the one base. SIGTERM and Ctrl-C let
    running answers finish.
    """
    settings = ServeSettings(**given(options))
    start_logging(quiet=quiet)
    try:
        from softprompt.server.starting import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("softprompt", "torch", "transformers"):
            raise
        raise UsageError(
            f'serving needs {error.name}, it is not installed: pip install "softprompt[serve]"'
        ) from error
    serve(settings)
