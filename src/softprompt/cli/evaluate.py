"""``softprompt evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.inputs import recorded_data
from softprompt.cli.options import (
    Command,
    base_options,
    given,
    label_names_option,
    load_prompts,
    option,
    output_options,
    show,
    start_logging,
    together,
)
from softprompt.cli.ray_options import on_ray, ray_options, refused_without_ray
from softprompt.errors import UsageError, nearest
from softprompt.untrusted import MOST_TEXT_BYTES, read_text

if TYPE_CHECKING:
    from softprompt.evaluation import Baseline
    from softprompt.inference import Combine, Ensemble, TunedPrompt


_data, _evaluation = partial(option, group="Data"), partial(option, group="Evaluation")
_baseline = partial(option, group="Baselines")

BASELINES = ("zero-shot", "instruction", "few-shot", "instruction+few-shot")
"""Names of baselines on the command line."""
_SHOTS = 4

record_options = together(
    _data(
        "--data",
        required=True,
        type=click.Path(),
        help="Held-out records: a file, - for stdin, or org/name of the Hub.",
    ),
    _data("--input-field", help="Column of the input; by default as in training."),
    _data("--output-field", help="Column of the target; by default as in training."),
    label_names_option("Data"),
)
task_option = _evaluation(
    "--task",
    type=click.Choice(["classification", "generation"]),
    help="Kind of targets; by default as in training.",
)
scoring_options = together(
    _evaluation(
        "--normalize", is_flag=True, help="Length-normalise label scores: divide by the label's token count."
    ),
    _evaluation("--batch-size", type=int, help="Batch size."),
)
baseline_options = together(
    _baseline("--template", help="Template of the input, where no prompt has one, or instead of its own."),
    _baseline("--label", "labels", multiple=True, help="Label; by default those of the data.  [repeatable]"),
    _baseline("--instruction", type=click.Path(), help="File with a hand-written prompt."),
    _baseline("--few-shot", type=int, help=f"Number of demonstrations.  [default: {_SHOTS}]"),
    _baseline("--examples", type=click.Path(), help="Demonstrations; by default from the prompt's training data."),
    _baseline("--example-seed", type=int, help="Seed that draws demonstrations.  [default: 0]"),
    _baseline("--chat", is_flag=True, help="Chat template: the input as user, what stands before it as system."),
    _baseline("--max-source-length", type=int, help="Maximum input length, in tokens.  [default: 256]"),
    _baseline("--max-target-length", type=int, help="Maximum answer length, in tokens.  [default: 128]"),
)
"""Options of a base without a tuned prompt; see ``baselines_of``."""
prediction_options = together(
    option(
        "--predictions",
        type=click.Path(),
        group="Output",
        help="File for the outcome of each record, as JSON lines.",
    ),
    option("--overwrite", is_flag=True, group="Output", help="Replace the file of predictions."),
)


@click.command("evaluate", cls=Command)
@click.argument("prompt_dirs", nargs=-1)
@record_options
@_data("--task-field", help="Column with each record's task, for multitask prompts.")
@_data("--limit", type=int, help="Evaluate the first records only.")
@task_option
@_evaluation("--task-name", help="Task of a multitask prompt, by name or number.")
@_evaluation(
    "--combine",
    type=click.Choice(["mean", "vote"]),
    help="Ensemble of several prompts: mean log-probability (default), or majority vote.",
)
@_evaluation("--without-prompt", is_flag=True, help="Evaluate the base model with the template alone.")
@scoring_options
@_evaluation(
    "--engine",
    type=click.Choice(["auto", "forest", "expand", "plain"]),
    help="Engine of the forward passes; by default the fastest exact one.",
)
@_evaluation(
    "--baselines", metavar="LIST", help=f"Evaluate these as well: {', '.join(BASELINES)}; separated by commas."
)
@baseline_options
@base_options
@option(
    "--shard",
    type=click.Choice(["fsdp", "tp"]),
    group="Base model",
    help="Spread the base over torchrun's processes; see tune.",
)
@prediction_options
@ray_options
@output_options
def command(
    *,
    prompt_dirs: tuple[str, ...],
    data: str,
    combine: Combine | None,
    baselines: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Evaluate a prompt, or a base alone, on a data file.

    Several prompts of one base and one label set are evaluated as an ensemble, and each by itself.
    Without a prompt, --base-model is evaluated with --template, and with --instruction or --few-shot
    where these are given. With --baselines, or one of these, a prompt stands beside what it should beat.
    """
    if combine is not None and len(prompt_dirs) < 2:
        raise UsageError("--combine would be ignored with one prompt; name two or more, or leave it out")
    if options["address"] is not None:
        on_ray("evaluate", prompt_dirs, data, options | {"baselines": baselines}, as_json=as_json, quiet=quiet)
        return
    refused_without_ray(options)
    start_logging(quiet=quiet)
    from softprompt.evaluation import evaluate

    names = _implied(prompt_dirs, options) if baselines is None else [each.strip() for each in baselines.split(",")]
    made = baselines_of(names, prompt_dirs, options)
    subject: TunedPrompt | Ensemble | Baseline
    subject = _prompts(prompt_dirs, combine, options) if prompt_dirs else made.pop(0)
    report = evaluate(subject, data, baselines=made, silence_progress_bars=quiet, **given(options))
    show(report.to_dict(), str(report), as_json=as_json)


def _implied(prompt_dirs: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return the baselines that stand beside a prompt because their options were given."""
    shown = any(options[name] is not None for name in ("few_shot", "examples", "example_seed"))
    told = options["instruction"] is not None
    return [] if not prompt_dirs else ["instruction"] * told + ["few-shot"] * shown


def _prompts(
    prompt_dirs: tuple[str, ...], combine: Combine | None, options: dict[str, Any]
) -> TunedPrompt | Ensemble:
    from softprompt.inference import Ensemble

    prompts = load_prompts(prompt_dirs, options)
    if len(prompts) == 1:
        return prompts[0]
    return Ensemble(prompts, combine=combine or "mean", names=prompt_dirs, task=options.pop("task_name"))


def baselines_of(names: Sequence[str], prompt_dirs: Sequence[str], options: dict[str, Any]) -> list[Baseline]:
    """Return the baselines of some names, from the options of ``baseline_options``, popped from ``options``.

    Without a prompt the options of the base are popped too, and without a name the others say which it is.

    Raises:
        UsageError: A name is unknown, an option is missing, or would be ignored.
    """
    from softprompt.evaluation import Baseline

    shared = given({"template": options.pop("template"), "chat": options.pop("chat") or None})
    frame = given({name: options.pop(name) for name in ("labels", "max_source_length", "max_target_length")})
    text = options.pop("instruction")
    shots = given({name: options.pop(name) for name in ("few_shot", "examples", "example_seed")})
    if not prompt_dirs and not names:
        names = ["+".join(["instruction"] * bool(text) + ["few-shot"] * bool(shots)) or "zero-shot"]
    for used, values, advice in (
        (
            any("instruction" in name for name in names),
            given({"instruction": text}),
            "name the baseline instruction too",
        ),
        (any("few-shot" in name for name in names), shots, "name the baseline few-shot too"),
        (bool(names), shared, "name a baseline too"),
        (not prompt_dirs, frame, "evaluate a base without a prompt"),
    ):
        if values and not used:
            flag = next(iter(values)).replace("labels", "label").replace("_", "-")
            raise UsageError(f"--{flag} would be ignored: {advice}, or leave it out")
    if not prompt_dirs:
        frame |= given({name: options.pop(name, None) for name in ("base_model", "torch_dtype", "device", "shard")})
        if "base_model" not in frame or options.pop("ignore_fingerprint"):
            raise UsageError("without a prompt's folder name a base, --base-model, and no --ignore-fingerprint")
    found = []
    for name in names:
        if name not in BASELINES:
            raise UsageError(f"there is no baseline {name!r}{nearest(name, BASELINES)}; use {', '.join(BASELINES)}")
        own: dict[str, Any] = {} if "instruction" not in name else {"instruction": _text_of(text)}
        own |= {} if "few-shot" not in name else _demonstrations(shots, prompt_dirs)
        found.append(Baseline(**own, **shared, **frame))
        frame = {}  # the others are of the first one's base, labels and limits
    return found


def _text_of(file: str | None) -> str:
    if file is None:
        raise UsageError("the baseline instruction needs --instruction, a file with the text")
    return read_text(Path(file), MOST_TEXT_BYTES, UsageError)


def _demonstrations(shots: dict[str, Any], prompt_dirs: Sequence[str]) -> dict[str, Any]:
    """Return what a few-shot baseline draws from; by default the records that the first prompt was tuned on."""
    examples = shots.get("examples")
    if examples is None and prompt_dirs:
        examples = recorded_data(prompt_dirs[0], "--examples", "train_data")
    if examples is None:
        raise UsageError("few-shot needs --examples, a file with records to show; their answers are read")
    return {"few_shot": shots.get("few_shot", _SHOTS), "examples": examples, "seed": shots.get("example_seed", 0)}
