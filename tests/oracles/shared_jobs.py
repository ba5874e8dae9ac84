"""Jobs that one process does alone, and several share: what they came to is compared."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import softprompt
from softprompt import compare, evaluate
from softprompt.cli.main import run
from softprompt.errors import DistributedError, SoftPromptError, TrainingError
from softprompt.evaluation import Baseline, passes
from softprompt.inference import Ensemble, TunedPrompt
from softprompt.training import Events, loop, sweep, tracking, tune
from softprompt.training.gradients import Step
from softprompt.world import joined, launched, world

SETTINGS = {"num_epochs": 3, "batch_size": 5, "accumulate_steps": 2, "silence_progress_bars": True}
SETTINGS |= {"tuning_config": {"num_virtual_tokens": 3}, "max_target_length": 8}
TEXT = "Answer with one word: good or bad. The parcel service is late again, and label every input."


def came_to(tuned):
    """What is compared of a prompt."""
    manifest = tuned.whole
    validation = {name: value for name, value in manifest.metrics.get("validation", {}).items()}
    losses = [each["loss"] for each in manifest.history]
    return {**tuned.module.stored(), "losses": torch.tensor(losses), "validation": validation}


def tuned_of(folder, output, base="llama", **options):
    length = {} if options.get("method") == "cpt" else SETTINGS["tuning_config"]
    tuning = {**length, **options.pop("tuning_config", {})}
    data = options.pop("data", (folder / "train.jsonl", folder / "test.jsonl"))
    return tune(folder / base, *data, output=output, **{**SETTINGS, **options, "tuning_config": tuning})


def labels(folder, output):
    save = TunedPrompt.save

    def slow(*given, **known):  # the others would return before
        time.sleep(0.5)
        return save(*given, **known)

    with mock.patch.object(TunedPrompt, "save", slow):
        tuned, bars, shown = tuned_of(folder, output), [], passes.progress_bar
    written = (output / "adapter_config.json").is_file()

    @contextmanager
    def watched(*given, **known):
        with shown(*given, **known) as bar:
            yield bar
        bars.append((given[1], bar.n, bar.total))

    passes.progress_bar = watched
    with joined():
        found = [
            evaluate(tuned, folder / "test.jsonl", batch_size=4, **each) for each in ({}, {"task": "generation"})
        ]
        found.append(evaluate(Ensemble([tuned, tuned]), folder / "test.jsonl"))
        bars = world().from_main(lambda: bars)
    passes.progress_bar = shown
    reports = [{name: each.to_dict()[name] for name in ("accuracy", "rouge_l", "perplexity")} for each in found]
    outcomes = [[each.answer for each in report.outcomes] for report in found]
    found = {"reports": reports, "outcomes": outcomes, "bars": bars}
    return {**came_to(tuned), **found, "written": written, "world": (world().size, launched().size)}


def answered(folder, output):
    """What the commands print that answer, and how many inputs this process answered."""
    tuned_of(folder, output, num_epochs=1)
    (folder / "empty.jsonl").write_text('{"input": "good"}\n{"input": "bad"}\n{"input": 3.5}\n{"input": null}\n')
    plain = [TunedPrompt.classify, TunedPrompt.generate]
    counts, said = [], []

    def counted(method):
        def call(self, requests, **options):
            counts.append(len(requests))
            return method(self, requests, **options)

        return call

    TunedPrompt.classify, TunedPrompt.generate = map(counted, plain)
    lines = "good\n\nbad\nthe film was fine\n" if launched().is_main else ""
    for words in (
        ["classify", output],
        ["generate", output, "--max-new-tokens", 3, "--seed", 1, "--temperature", 1],
    ):
        for data in ([], ["--data", "-"], ["--data", folder / "test.jsonl"], ["--data", folder / "empty.jsonl"]):
            text = '{"input": "good"}\n{"input": "bad"}\n' if "-" in data and lines else lines
            sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
            with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
                code = run([*map(str, words + data), "--json"])
            last = errors.getvalue().splitlines()[-1:] if code else []
            said.append([code, last, json.loads(out.getvalue() or "null")])
    sys.stdin = sys.__stdin__
    TunedPrompt.classify, TunedPrompt.generate = plain
    return {"said": said, "counts": counts}


def seeds(folder, output):
    options = {"seeds": 2, "num_epochs": 2, "early_stopping_patience": 1}
    return came_to(tuned_of(folder, output, **options, accumulate_steps=1))


def probed(folder, output):
    return came_to(tuned_of(folder, output, learning_rate="auto"))


def texts(folder, output):
    options = {"task": "generation", "max_tokens_per_batch": 40, "optimizer": "adafactor", "num_epochs": 1}
    return came_to(tuned_of(folder, output, base="bart", **options))


def tracked(folder, output):
    """A run that goes to a tracker, which writes down what it gets."""
    told, plain = [], (tracking.find_spec, tracking.Tracking._started)
    tracker = SimpleNamespace(name="tensorboard", log=lambda values, step=None: told.append(step), finish=int)
    tracking.find_spec, tracking.Tracking._started = str, lambda *given, **known: tracker
    try:
        tuned_of(folder, output, track="tensorboard", num_epochs=2)
    finally:
        tracking.find_spec, tracking.Tracking._started = plain
    return {"told": told}


def signalled(number, update, rank=None):
    """Have a process, or the last, send itself a signal after an update; return what told of updates before."""
    told, rank = Events.update, launched().size - 1 if rank is None else rank

    def tell(self, state, loss):
        told(self, state, loss)
        if state.update == update and launched().rank == rank:
            os.kill(os.getpid(), number)

    Events.update = tell
    return told


def stopped(folder, output):
    """A run that one of the processes is asked to stop, from its fourth update on."""
    told = signalled(signal.SIGTERM, update=4)
    try:
        tuned_of(folder, output)
    except SoftPromptError as error:
        return {"said": str(error)}
    finally:
        Events.update = told


def diverged(folder, output):
    """Prompts that start from another seed in each process."""
    try:
        tuned_of(folder, output, seed=73 + launched().rank)
    except SoftPromptError as error:
        return {"said": str(error)}


def disturbed(folder, output, *, update, every):
    """A run in which the last process's prompt is bent after an update, and prompts are compared every few."""
    plain, between = loop._round, loop.UPDATES_BETWEEN_CHECKS

    def bent(due, check_stop):
        plain(due, check_stop)
        ((candidate, _),) = due
        if candidate.state.update == update and launched().rank == launched().size - 1:
            next(candidate.stage.prompt.parameters()).data[0, 0] += 1e-6

    loop._round, loop.UPDATES_BETWEEN_CHECKS = bent, every
    try:
        tuned_of(folder, output, num_epochs=2)
    except DistributedError as error:
        return {"said": str(error)}
    finally:
        loop._round, loop.UPDATES_BETWEEN_CHECKS = plain, between
    return {"said": "nothing"}


def bent_between(folder, output):
    return disturbed(folder, output, update=2, every=2)


def bent_at_the_end(folder, output):
    return disturbed(folder, output, update=6, every=50)


def refused(folder, output):
    """What is wrong for one is wrong for all: an output, data, a row that the last process has."""
    said, add = [], Step.add

    def broken(step, batch, part):
        if launched().rank == launched().size - 1:
            step.problem = TrainingError("the loss of a row is not finite")
        return add(step, batch, part)

    for options in ({"output": folder}, {"data": (folder / "none.jsonl", None)}, {}):
        Step.add = add if options else broken
        try:
            tuned_of(folder, **{"output": output, **options})
        except SoftPromptError as error:
            said.append(str(error))
    Step.add = add
    return {"said": said}


def method_job(options):
    def job(folder, output):
        return came_to(tuned_of(folder, output, num_epochs=2, **options))

    return job


def parameterised(name, **tuning):
    return {"tuning_config": {"parameterization": name, **tuning}}


METHODS = {
    "prompt_tuning": {},
    "low_rank": parameterised("low_rank", parameterization_rank=2),
    "ulpt": parameterised("ulpt", parameterization_rank=2),
    "residual": parameterised("residual"),
    "superpos": parameterised("superpos", parameterization_rank=6),
    "p_tuning": {"method": "p_tuning", "tuning_config": {"encoder_hidden_size": 8}},
    "prefix": {"method": "prefix"},
    "cartridge": {"method": "cartridge"},
    "cpt": {"method": "cpt", "context_records": 2},
}


WIDE = {"p_tuning": {"method": "p_tuning"}, "prefix": {"method": "prefix"}, "residual": METHODS["residual"]}


def wide(folder, output, **more):
    """Methods on the bundled model, whose width makes rounding grow."""
    found = {}
    for name, options in WIDE.items():
        tuning = SETTINGS["tuning_config"] | options.get("tuning_config", {})
        run_options = {**SETTINGS, "num_epochs": 2, **options, **more, "tuning_config": tuning}
        found |= {name: tune("demo", folder / "train.jsonl", **run_options).module.materialize().detach()}
    return found


def multitask(folder, output, source=None, **more):
    """A prompt of two tasks that learns from their teachers, or starts from that of a source without."""
    data = {"one": folder / "train.jsonl", "two": folder / "test.jsonl"}
    start = {"prompt_tuning_init_method": "AVERAGE_SOURCE", "prompt_tuning_init_source_model": str(source)}
    options = {"tuning_config": start, "distillation_weight": 0} if source else {}
    tuned = tuned_of(folder, output, method="multitask", data=(data, data), **{"num_epochs": 2, **options, **more})
    return {**came_to(tuned), "teachers": tuned.metrics.get("teachers", {}).get("updates", 0)}


def from_source(folder, output):
    """Few updates: what rounding becomes of them is another test's."""
    multitask(folder, source := output.with_name(f"{output.name}-source"), max_steps=1)
    return multitask(folder, output, source, num_epochs=1)


def compared(folder, output):
    prompts = {f"{seed}": tuned_of(folder, None, num_epochs=1, seed=seed) for seed in (73, 74)}
    with joined():
        found = compare(prompts | {"base": Baseline()}, folder / "test.jsonl", batch_size=4)
    reports = {name: [each.accuracy, each.perplexity] for name, each in found.reports.items()}
    answers = {name: [each.answer for each in own.outcomes] for name, own in found.reports.items()}
    against = {name: [each.won, each.lost, each.p_value] for name, each in found.against.items()}
    return {"reports": reports, "answers": answers, "against": against}


def swept(folder, output):
    space = {"learning_rates": ["x0.3", "x1", "x3"], "lengths": ["2", "3"], "eta": 2}
    settings = {**SETTINGS, "num_epochs": 4, "accumulate_steps": 1, "tuning_config": {}}
    found = sweep(
        folder / "llama", folder / "train.jsonl", folder / "test.jsonl", output=output, space=space, **settings
    )
    return {**came_to(found.prompt), "best": [each.name for each in found.candidates]}


def distilled(folder, output, text=TEXT, **more):
    run_options = {"max_source_length": 48, "max_target_length": 6, "num_epochs": 2, "batch_size": 4}
    options = run_options | {"num_virtual_tokens": 3, "silence_progress_bars": True, **more}
    asked = [{"input": f"is parcel {number} late"} for number in range(9)]
    tuned = softprompt.distill(folder / "chat", system_prompt=text, questions=asked, output=output, **options)
    return came_to(tuned)


def distilled_of_a_document(folder, output):
    """Read in parts, asked about and answered by the base itself."""
    run_options = {"max_source_length": 48, "max_target_length": 6, "num_epochs": 1, "batch_size": 4}
    options = run_options | {"num_virtual_tokens": 3, "silence_progress_bars": True, "report": False}
    options |= {"documents": [TEXT * 4], "self_study": 10, "chunk_tokens": 120}
    return came_to(softprompt.distill(folder / "chat", output=output, **options))


def distilled_kv(folder, output):
    return distilled(folder, output, kind="kv", report=False)


def distilled_beside(folder, output):
    """Beside another cartridge, whose batches stay whole: micro-batches of an update go to processes in turn."""
    other = output.with_name(f"{output.name}-other")
    distilled(folder, other, TEXT[::-1], kind="kv", report=False)
    options = {"distractors": [other], "max_tokens_per_batch": 60}
    return distilled(folder, output, kind="kv", report=False, **options)


_JOBS = labels, answered, seeds, probed, texts, tracked, stopped, refused, diverged, bent_between, bent_at_the_end
_JOBS += wide, multitask, from_source, compared, swept, distilled, distilled_of_a_document
_JOBS += distilled_kv, distilled_beside
JOBS = {each.__name__: each for each in _JOBS}
JOBS |= {name: method_job(options) for name, options in METHODS.items()}


KILLED = {"killed": None, "killed_0": 0, "killed_2": 2}
"""Who is killed: the last process, or one by its rank."""


def killed(folder, name):
    """The command line, one of whose processes is killed at its sixth update."""
    signalled(signal.SIGKILL, update=6, rank=KILLED[name])
    words = ["tune", "--base-model", folder / "llama", "--train-data", folder / "train.jsonl", "--batch-size", 4]
    words += ["--num-epochs", 3, "--num-virtual-tokens", 3, "--accumulate-steps", 2]
    sys.exit(run([*map(str, words), "--output", str(folder / f"{name}-{launched().size}")]))


def main():
    """Do jobs in one of several processes and keep what they came to."""
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = {name: JOBS[name](folder, folder / f"{name}-{launched().size}") for name in names if name not in KILLED}
    torch.save(found, folder / f"found-{launched().size}-{launched().rank}.pt")
    for name in KILLED.keys() & set(names):
        killed(folder, name)
