"""What a run is about to do, said before it does it, and what looks wrong about it; the dry run."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from softprompt.backbone import own_part
from softprompt.errors import line
from softprompt.training.gradients import passed
from softprompt.training.loop import duration

if TYPE_CHECKING:
    from softprompt.data import TokenRow
    from softprompt.training.preparation import Prepared, TaskRows
    from softprompt.training.stage import Stage

logger = logging.getLogger(__name__)

NEARLY_ALL = 0.9
"""Share of truncated records from which on a warning says so."""
LEAST_FALL = 0.99
"""Share of the first epoch's loss that the last one's has to fall below, or nothing was learnt."""
MOST_LABELS_SHOWN = 10
SAMPLES = 3
_ID = re.compile(r"(?:(?:label|class)[ _-]?)?(\d+)", re.IGNORECASE)


@final
@dataclass(frozen=True, slots=True)
class TaskSummary:
    """The data of one task, tokenised.

    Attributes:
        name: The task; empty for a single data set.
        records: Training records.
        validation_records: Validation records.
        labels: Training records of each label; None for free text.
        cut: Share of the training records whose input or target the length limits truncate.
        longest: Tokens of the longest training row, input and target.
    """

    name: str
    records: int
    validation_records: int
    labels: Mapping[str, int] | None
    cut: float
    longest: int

    @classmethod
    def of(cls, task: TaskRows) -> TaskSummary:
        """Count a task's rows."""
        counts = Counter(str(record.target) for record in task.data.train)
        return cls(
            name=task.data.name,
            records=len(task.train),
            validation_records=len(task.validation),
            labels=None if task.labels is None else dict(sorted(counts.items())),
            cut=sum(row.source_cut or row.target_cut for row in task.train) / len(task.train),
            longest=max(len(row.source) + len(row.target) for row in task.train),
        )

    def __str__(self) -> str:
        parts = [f"{self.records:,} records, the longest of {self.longest:,} tokens, {self.cut:.0%} cut"]
        if self.validation_records:
            parts.append(f"{self.validation_records:,} to validate on")
        if self.labels is not None:
            shown = [f"{label} {count:,}" for label, count in self.labels.items()]
            if len(shown) > MOST_LABELS_SHOWN:
                fewest, most = min(self.labels.values()), max(self.labels.values())
                span = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
                shown = [f"{len(shown)} of {span} records each"]
            parts.append(f"labels: {', '.join(shown)}")
        return f"{self.name}: {'; '.join(parts)}" if self.name else "; ".join(parts)


@final
@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do; nothing was trained and nothing written.

    Attributes:
        tasks: The data of each task.
        samples: The first records as the model reads them, with the virtual tokens' place, and their targets;
            ``tokens`` counts those of both.
        steps: Optimizer steps, of all stages.
        parameters: Trained parameters.
        memory: Bytes of the base and of the largest pass with its gradient, as measured in one.
        seconds: What the training would take at the speed of that pass, without loading and validation.
    """

    tasks: tuple[TaskSummary, ...]
    samples: tuple[dict[str, Any], ...]
    steps: int
    parameters: int
    memory: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for number, sample in enumerate(self.samples, start=1):
            lines += [f"record {number}, {sample['tokens']} tokens:", f"  {sample['input']!r}"]
            lines.append(f"  -> {sample['target']!r}")
        lines += map(str, self.tasks)
        lines.append(
            f"{self.steps:,} steps in about {duration(self.seconds)} without loading and validation, "
            f"{self.parameters:,} trained parameters, about {self.memory / 1e9:.2f} GB of memory"
        )
        return "\n".join([*lines, "nothing was trained and nothing written"])


def summarize(prepared: Prepared, stages: Sequence[Stage]) -> None:
    """Log what a run is about to do, and warn of what looks wrong."""
    for task in prepared.tasks:
        logger.info("%s", line(str(TaskSummary.of(task))))
        for problem in _problems(task):
            logger.warning("%s", line(f"task {task.data.name}: {problem}" if task.data.name else problem))
    for stage in stages:
        per_epoch = stage.sampling.updates_per_epoch
        logger.info("%d steps%s, %d of them an epoch", stage.total_updates(), stage.of, per_epoch)


def dry_run_of(prepared: Prepared, stages: Sequence[Stage]) -> DryRun:
    """Return what a run would do, after one pass over its largest batch, of which nothing is kept."""
    stage = stages[-1]
    parts = [part for update in stage.sampling.updates(0) for part in update]
    lengths = stage.sampling.lengths
    largest = max(parts, key=lambda part: sum(lengths[i] for i in part))
    memory, seconds = _measured(prepared, stage, largest)
    steps = sum(each.total_updates() for each in stages)
    tokens = sum(lengths) / stage.sampling.updates_per_epoch * steps
    return DryRun(
        tasks=tuple(TaskSummary.of(task) for task in prepared.tasks),
        samples=tuple(_sample(row, task, prepared) for task in prepared.tasks for row in task.train[:SAMPLES]),
        steps=steps,
        parameters=sum(each.numel() for each in stage.prompt.parameters() if each.requires_grad),
        memory=memory,
        seconds=seconds * tokens / sum(lengths[i] for i in largest) * prepared.settings.seeds,
    )


def _measured(prepared: Prepared, stage: Stage, batch: list[int]) -> tuple[int, float]:
    """Return the bytes and the seconds that a pass over a batch and its gradient take, the base's included."""
    storages = (own_part(each).untyped_storage() for each in prepared.base.model.parameters())
    weights = {each.data_ptr(): each.nbytes() for each in storages}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = own_part(tensor).untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        passed(stage, batch)  # the first one also prepares, so another is timed
    held = sum(each.nbytes() for each in kept.values())  # nothing of a sharded layer that was gathered
    kept.clear()
    started = time.perf_counter()
    passed(stage, batch)
    if prepared.base.device.type == "cuda":
        torch.cuda.synchronize(prepared.base.device)
    seconds = time.perf_counter() - started
    return sum(weights.values()) + held, seconds


def _sample(row: TokenRow, task: TaskRows, prepared: Prepared) -> dict[str, Any]:
    decode = task.tokenizer.tokenizer.decode
    before, after = decode(list(row.source[: row.at])), decode(list(row.source[row.at :]))
    virtual = f"[{prepared.config.num_virtual_tokens} virtual tokens]"
    return {
        "input": f"{before}{virtual}{after}",
        "target": decode(list(row.target)),
        "tokens": len(row.source) + len(row.target),
    }


def _problems(task: TaskRows) -> list[str]:
    """Return what looks wrong about a task's data, each as a sentence."""
    found, data = [], task.data
    trained = {(row.source, row.target) for row in task.train}
    shared = sum((row.source, row.target) in trained for row in task.validation)
    if shared:
        found.append(
            f"{shared:,} of {len(task.validation):,} validation records are training records too: they say little "
            "about new ones; take them out of one of the two"
        )
    cut = sum(row.source_cut for row in task.train) / len(task.train)
    if cut >= NEARLY_ALL:
        limit = task.tokenizer.max_source_length
        found.append(
            f"{cut:.0%} of the records are cut to max_source_length {limit}; raise it, or shorten the input"
        )
    targets = Counter(str(record.target) for record in data.train)
    if len(targets) == 1 and len(data.train) > 1:
        found.append(f"every record has the same target, {next(iter(targets))!r}: there is nothing to tell apart")
    if data.beyond_limit:
        found.append(
            f"only records beyond the limit have {_some(data.beyond_limit)}: the data is sorted; shuffle it first"
        )
    return found + _label_problems(task)


def _label_problems(task: TaskRows) -> list[str]:
    labels, found = task.data.labels or (), []
    ids = [match[1] for label in labels if (match := _ID.fullmatch(label))]
    if labels and len(ids) == len(labels) and "0" in ids:
        names = ", ".join(f"{label}=..." for label in labels[:2])
        found.append(
            f"the labels are numbers ({_some(labels)}), which say nothing to the base model; "
            f"give them names with label_names ({names})"
        )
    held_out = {record.target for record in task.data.validation}
    missing = [label for label in labels if label not in held_out]
    if held_out and 2 * len(missing) >= len(labels):
        found.append(
            f"no validation record has {_some(missing)}: the data is sorted; shuffle it before it is divided"
        )
    return found


def _some(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:5])
    return f"{shown} and {len(labels) - 5} more" if len(labels) > 5 else shown


def nothing_learnt(
    prepared: Prepared, metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> str | None:
    """Return the sentence for a run that learnt nothing, None for one that did or cannot be judged.

    With labels the kept validation accuracy tells, against the share of the commonest label; otherwise whether the
    training loss fell from the first epoch to the last.
    """
    validation, judged = metrics.get("validation", {}), False
    advice = "change the learning rate, the initial prompt or the base model, or train for more epochs"
    for task in prepared.tasks:
        name = f"{task.data.name} accuracy" if len(prepared.tasks) > 1 else "accuracy"
        truth = Counter(record.target for record in task.data.validation)
        if name not in validation or len(truth) < 2:
            continue
        judged = True
        ((label, count),) = truth.most_common(1)
        share = count / sum(truth.values())
        if validation[name] <= share:
            return (
                f"the prompt learnt nothing: validation {name} {validation[name]:.3f} is not above {share:.3f}, "
                f"the share of the commonest label {label!r}; {advice}"
            )
    if not judged and len(history) > 1 and history[-1]["loss"] > LEAST_FALL * history[0]["loss"]:
        return (
            f"the prompt learnt nothing: the loss went from {history[0]['loss']:.4f} in the first epoch to "
            f"{history[-1]['loss']:.4f} in the last; {advice}"
        )
    return None
