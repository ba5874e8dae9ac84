"""``softprompt push``."""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.options import Command, given, option, output_options, show, start_logging


@click.command("push", cls=Command)
@click.argument("prompt_dir")
@click.argument("repo_id", metavar="ORG/NAME")
@option(
    "--private/--public", default=None, group="Repository", help="Whether a repository that is made is private."
)
@option("--revision", group="Repository", help="Branch, made if needed; by default the main one.")
@option("--create-pr", is_flag=True, group="Repository", help="Open a pull request instead of a commit.")
@option("--commit-message", group="Repository", help="Message of the commit.")
@option("--base-model", group="Model card", help="Hub id of the base model, where the prompt records a folder.")
@option("--license", group="Model card", help="Identifier of the licence, such as apache-2.0.")
@option(
    "--dataset",
    "datasets",
    multiple=True,
    group="Model card",
    help="Hub id of a data set it was trained on.  [repeatable]",
)
@output_options
def command(*, prompt_dir: str, repo_id: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish a prompt on the Hugging Face Hub, with its model card.

    The repository is made if needed. Log in with `hf auth login`, or set HF_TOKEN.
    """
    start_logging(quiet=quiet)
    from softprompt.artifacts import push

    address = push(prompt_dir, repo_id, **given(options))
    show({"repository": repo_id, "commit": address}, address, as_json=as_json)
