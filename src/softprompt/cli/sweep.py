"""``softprompt sweep``."""

from __future__ import annotations

from typing import Any

import click

from softprompt.cli.options import Command, given, option, options_of, parts_of, show
from softprompt.cli.ray_options import address_option
from softprompt.cli.tune import run_options, run_values
from softprompt.errors import UsageError
from softprompt.training import SweepSettings


@click.command("sweep", cls=Command)
@options_of(SweepSettings)
@address_option("Sweep", "Train the candidates on Ray, started here, or the cluster at an address.")
@option("--workers", type=click.IntRange(min=1), group="Sweep", help="Workers on Ray; by default one for each GPU.")
@run_options("learning_rate", "seeds", "restarts")
def command(
    *,
    config: str | None,
    overwrite: bool,
    resume: bool,
    address: str | None,
    workers: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the learning rate, length, initialisation and method of a prompt.

    Candidates are trained side by side; at the end of each rung the validation data decide which go on. The best
    prompt is written with sweep.json and sweep.png. Report its quality on records that neither of the two had.
    """
    space = given(parts_of(options, SweepSettings))
    values = run_values(config, options, quiet=quiet)
    space = {**values.pop("sweep", {}), **space}
    output = values.pop("output", None)
    if output is None:
        raise UsageError("sweep needs --output DIR, for its state and for the best prompt")
    if workers is not None and address is None:
        raise UsageError("--workers would be ignored without --ray; leave it out")
    from softprompt.training import sweep

    values |= {"ray": address, "workers": workers}
    found = sweep(output=output, overwrite=overwrite, resume=resume, space=space, **values)
    text = f"{found}\n\nbest: candidate {found.candidates[0].name}, written to {output}"
    show(found.to_dict() | {"output": output}, text, as_json=as_json)
