"""``softprompt convert``."""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.generate import request_of
from softprompt.cli.options import fingerprint_option, output_options
from softprompt.cli.streams import show, start_logging, table
from softprompt.errors import UsageError


@click.command("convert")
@click.argument("source")
@click.argument("destination")
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    help="softprompt, peft, caikit, tgis, npy, tensor, extended-vocab or vllm.",
)
@click.option("--task-name", help="Task of a multitask prompt, by number or name.")
@click.option("--text", help="Input of the request that vllm writes.")
@click.option(
    "--field", "pairs", multiple=True, metavar="NAME=TEXT", help="Field of a template with several."
)
@click.option("--name", help="What extended-vocab calls the prompt.  [default: the source's name]")
@click.option(
    "--add", multiple=True, metavar="NAME=PROMPT", help="Further prompt in the extended-vocab."
)
@click.option(
    "--add-task",
    "add_tasks",
    multiple=True,
    metavar="NAME=TASK",
    help="Task of a further multitask prompt, by its name in --add.",
)
@click.option(
    "--template", help="Verbalizer of a source that has none, such as 'Text: {{input}} Label:'."
)
@click.option("--overwrite", is_flag=True, help="Replace what the destination holds.")
@click.option("--base-model", help="Base model of the prompt; by default the recorded one.")
@click.option("--torch-dtype", help="Data type to load the base in; by default the checkpoint's.")
@click.option("--device", help="Device to load the base on, such as cpu or cuda:0.")
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

    further = _named(add, "--add", "PROMPT")
    tasks = _named(add_tasks, "--add-task", "TASK")
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
    ids = {
        f"ids of {n}": f"{p['token_ids'][0]} to {p['token_ids'][-1]}" for n, p in prompts.items()
    }
    lost = {"lost": ", ".join(done.lost)} if done.lost else {}
    rows = table(head | facts | ids | lost)
    show(head | dict(done.facts) | {"lost": list(done.lost)}, rows, as_json=as_json)


def _named(pairs: tuple[str, ...], option: str, kind: str) -> dict[str, str]:
    """Return what an option gives by name."""
    named: dict[str, str] = {}
    for pair in pairs:
        name, found, path = pair.partition("=")
        if not found or not name or not path:
            raise UsageError(f"{option} expects NAME={kind}, got {pair!r}")
        if name in named:
            raise UsageError(f"{option} names {name!r} twice; give one of them another name")
        named[name] = path
    return named
