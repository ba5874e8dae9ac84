"""``softprompt pull``."""

from __future__ import annotations

import click

from softprompt.cli.options import Command, option, output_options, overwrite_option, show, start_logging


@click.command("pull", cls=Command)
@click.argument("repo_id", metavar="ORG/NAME")
@click.argument("directory", metavar="[DIR]", required=False)
@option("--revision", group="Repository", help="Branch, tag or commit; by default the main branch.")
@overwrite_option
@output_options
def command(
    *, repo_id: str, directory: str | None, revision: str | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Fetch a prompt from the Hugging Face Hub into a folder, by default one of its name.

    Only the files of a prompt are taken, and checked; nothing in them is run.
    """
    start_logging(quiet=quiet)
    from softprompt.artifacts import pull

    path = pull(repo_id, directory or repo_id.rpartition("/")[2], revision=revision, overwrite=overwrite)
    show({"repository": repo_id, "output": str(path)}, f"{repo_id} is in {path}", as_json=as_json)
