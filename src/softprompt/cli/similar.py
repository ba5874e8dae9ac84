"""``softprompt similar``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from softprompt.cli.options import Command, option, output_options, say, show, start_logging
from softprompt.prompts import MEASURES, Measure

if TYPE_CHECKING:
    from softprompt.inspection import Retrieval


@click.command("similar", cls=Command)
@click.argument("prompt_dir")
@click.argument("folder")
@option("--top", type=int, group="Similarity", help="Show the most similar ones only.")
@option(
    "--measure",
    group="Similarity",
    type=click.Choice(MEASURES),
    default="mean",
    show_default=True,
    help="Cosine of the mean virtual tokens, or mean cosine of all pairs of virtual tokens.",
)
@output_options
def command(prompt_dir: str, folder: str, top: int | None, measure: Measure, as_json: bool, quiet: bool) -> None:
    """Show which prompts in the subfolders of FOLDER are most like a prompt.

    The weights are those of a weighted average of the prompts shown. Prompts of other bases, and
    folders without a readable prompt, are named on stderr.
    """
    start_logging(quiet=quiet)
    from softprompt.inspection import similar_prompts

    answer = similar_prompts(prompt_dir, folder, top=top, measure=measure)
    for each in answer.skipped:
        say(f"warning: skipped {each.folder}: {each.reason}")
    show(answer.to_dict(), _text(answer), as_json=as_json)


def _text(answer: Retrieval) -> str:
    if not answer.found:
        return "no prompt to compare with"
    lines = ["similarity  weight  prompt"]
    lines += [f"{each.similarity:>10.4f}  {each.weight:>6.3f}  {each.prompt}" for each in answer.found]
    return "\n".join(lines)
