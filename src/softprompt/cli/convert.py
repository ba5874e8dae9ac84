"""``softprompt convert``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from softprompt.cli.options import (
    Command,
    fingerprint_option,
    input_options,
    named,
    option,
    output_options,
    request_of,
    show,
    start_logging,
    table,
    trust_option,
)

_extended, _base = (partial(option, group=each) for each in ("Extended vocabulary", "Base model"))


@click.command("convert", cls=Command)
@click.argument("source")
@click.argument("destination")
@option(
    "--to",
    required=True,
    metavar="FORMAT",
    group="Output",
    help="softprompt, peft, caikit, tgis, npy, mlx-lm, tensor, extended-vocab or vllm.",
)
@option("--overwrite", is_flag=True, group="Output", help="Overwrite the destination.")
@option("--template", group="Input", help="Template of a source that has none, such as 'Text: {{input}} Label:'.")
@input_options
@option("--text", group="Input", help="Input of the request that vllm writes.")
@_extended("--name", help="Name of the prompt in extended-vocab.  [default: the source's name]")
@_extended("--add", multiple=True, metavar="NAME=PROMPT", help="Further prompt of extended-vocab.  [repeatable]")
@_extended(
    "--add-task",
    "add_tasks",
    multiple=True,
    metavar="NAME=TASK",
    help="Task of a further multitask prompt, by its name in --add.  [repeatable]",
)
@_base("--base-model", help="Base model of the prompt; by default the recorded one.")
@_base("--torch-dtype", help="Data type of the base model; by default its files'.")
@_base("--device", help="Device, such as cpu or cuda:0.")
@trust_option
@fingerprint_option
@output_options
def command(
    *,
    source: str,
    destination: str,
    text: str | None,
    pairs: tuple[str, ...],
    add: tuple[str, ...],
    add_tasks: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write a prompt in another format.

    The format of SOURCE is recognised from its files. Where they do not name the base model,
    --base-model does; a base that is loaded is checked against the prompt.
    """
    request = request_of(text, pairs) if text is not None or pairs else None
    start_logging(quiet=quiet)
    from softprompt.inference import convert

    further = named(add, "--add", "NAME=PROMPT")
    tasks = named(add_tasks, "--add-task", "NAME=TASK")
    done = convert(source, destination, text=request, add=further, add_tasks=tasks, **options)
    head = {
        "source": done.source,
        "source_format": done.source_format,
        "output": done.output,
        "output_format": done.output_format,
        "base_model": done.base_model,
    }
    facts = {name: v for name, v in done.facts.items() if name not in ("prompts", *head)}
    prompts = done.facts.get("prompts", {})
    ids = {f"ids of {n}": f"{p['token_ids'][0]} to {p['token_ids'][-1]}" for n, p in prompts.items()}
    lost = {"lost": ", ".join(done.lost)} if done.lost else {}
    rows = table(head | facts | ids | lost)
    show(head | dict(done.facts) | {"lost": list(done.lost)}, rows, as_json=as_json)
