"""The gradients of updates: micro-batches of several prompts in one pass, dropout, clipping, numbers not finite."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor
from torch.nn import Module

from softprompt.backbone import facts_of, passes_together, shard_of
from softprompt.engine import EngineRow
from softprompt.errors import TrainingError
from softprompt.prompts import CPTEmbedding, Prompt, PromptModule
from softprompt.training.optimisation import rate_factor, set_rates
from softprompt.training.state import RunState, Sums
from softprompt.world import world

if TYPE_CHECKING:
    from softprompt.training.objectives import BatchLoss
    from softprompt.training.sampling import Update
    from softprompt.training.stage import Stage

JOINED_TOKENS = 4096
"""Padded tokens up to which batches of several prompts make one pass, where ``max_tokens_per_batch`` is not set."""


@final
class Step:
    """The gradient of one update of one prompt.

    Each task's prompt is made once; the passes add their gradients to that value, and only their
    sum goes through the parameters behind it, which is the same by the chain rule.
    """

    def __init__(self, stage: Stage, state: RunState, update: Update) -> None:
        self.stage, self._state = stage, state
        self.update, self._idle = part_of_process(stage, update)
        self.problem: TrainingError | None = None
        used = [i for batch in update for i in batch]
        rows = [stage.rows[i] for i in used]
        targets = sum(row.scored for row in rows)
        self.sums = Sums(targets=targets, tokens=sum(len(row.source) + len(row.target) for row in rows))
        self._divisor = targets + len(used) * stage.context_tokens
        seed = stage.settings.seed * 1_000_033 + state.update
        with _dropout(stage.prompt, _drops(stage.prompt), seed):
            self._prompts = {
                task: stage.prompt.prompt(task) for task in sorted({stage.sampling.tasks[i] for i in used})
            }
        self._dropped = _dropped_tokens(stage, state, self._prompts)
        self._leaves = {task: prompt.leaves() for task, prompt in self._prompts.items()}
        for parameter in stage.prompt.parameters():
            parameter.grad = None

    @property
    def mixes_with(self) -> object:
        """What steps must have in common to share passes."""
        objective, first = self.stage.objective, next(iter(self._prompts.values()))
        sharded = world().size > 1 and shard_of(self.stage.model)  # all processes run the same number of passes
        if not objective.joins or self.stage.settings.keep_dropout or sharded:
            return id(self)
        return objective, first.prefix is None, first.decoder is None, first.sees_input

    def dropout(self) -> AbstractContextManager[None]:
        """Return the context that its passes run in."""
        seed = self.stage.settings.seed * 1_000_003 + self._state.update
        seed += world().rank * 1_000_000_007 if _rows_apart(self.stage) else 0  # the same rows, the same dropout
        return _dropout(self.stage.model, self.stage.settings.keep_dropout, seed)

    def padded(self, batch: list[int]) -> int:
        """Return the tokens of the longest row of a micro-batch."""
        return max(self.stage.sampling.lengths[i] for i in batch)

    def rows(self, batch: list[int]) -> tuple[list[EngineRow], list[int]]:
        """Return the rows of a micro-batch, each with the prompt of its task, and their tasks."""
        tasks = [self.stage.sampling.tasks[i] for i in batch]
        seen: dict[tuple[int, frozenset[int]], Prompt] = {}
        rows = []
        for row, task in zip((self.stage.rows[i] for i in batch), tasks, strict=True):
            # The rows that see the same virtual tokens share a prompt, which the engine then computes once.
            key = (task, self._dropped | self.stage.hidden.get(row, frozenset()))
            if key not in seen:
                seen[key] = self._leaves[task].without(key[1])
            rows.append(EngineRow(row.source, row.target, seen[key], row.at, row.unscored))
        return rows, tasks

    def add(self, batch: list[int], part: BatchLoss) -> Tensor:
        """Count a micro-batch, and return its share of the loss; one that is not finite is the problem."""
        if any(batch is each for each in self._idle):
            return 0.0 * part.loss
        if not part.is_finite():
            self.problem = _not_finite(self.stage, self._state, batch, part)
        self.sums.loss -= part.values.detach().sum().item()
        self.sums.penalty += 0.0 if part.penalty is None else part.penalty.sum().item()
        return part.loss / self._divisor

    @property
    def leaves(self) -> list[Tensor]:
        """What the passes add their gradients to."""
        return [leaf for prompt in self._leaves.values() for leaf in prompt.tensors]

    def is_finite(self) -> bool:
        """Return whether the gradient is."""
        return all(bool(torch.isfinite(each.grad).all()) for each in self.leaves if each.grad is not None)

    def apply(self, optimizer: torch.optim.Optimizer) -> float:
        """Change the parameters, where the gradient is sound; return the learning rate."""
        stage, state, settings = self.stage, self._state, self.stage.settings
        factor = rate_factor(settings.schedule, state.update, stage.total_updates(), settings.warmup_ratio)
        set_rates(optimizer, factor)
        if self.problem is None:
            try:
                self.hand_on()
                _clip(stage, state)
            except TrainingError as error:
                self.problem = error
            else:
                optimizer.step()
                if isinstance(stage.prompt, CPTEmbedding):
                    stage.prompt.project_()
        optimizer.zero_grad(set_to_none=True)
        return stage.learning_rate * factor

    def hand_on(self) -> None:
        """Hand the gradients of the prompts on to the parameters behind them."""
        made = [tensor for prompt in self._prompts.values() for tensor in prompt.tensors]
        summed = [leaf.grad for leaf in self.leaves]
        pairs = [pair for pair in zip(made, summed, strict=True) if pair[1] is not None]
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])


def steps_of(due: Sequence[tuple[Stage, RunState, Update]], check_stop: Callable[[], None]) -> list[Step]:
    """Return the gradients of updates; a prompt whose numbers are not finite does not reach into another's."""
    steps = [Step(*each) for each in due]
    if world().size > 1:  # they stop together, between two updates
        check_stop()
        check_stop = _go_on
    accumulate(steps, check_stop)
    if len(steps) > 1:
        # In backward NaN times the zeros of padding is NaN, which the other one of a pass may get.
        for number, step in enumerate(steps):
            if step.problem is None and step.mixes_with != id(step) and not step.is_finite():
                steps[number] = Step(*due[number])
                accumulate([steps[number]], check_stop)
    if apart := [step for step in steps if _rows_apart(step.stage)]:
        _add_up(apart)
    return steps


def _go_on() -> None:
    """Go on."""


def part_of_process(stage: Stage, update: Update) -> tuple[Update, Update]:
    """Return this process's part of an update, and what of it does not count.

    Each has its share of the rows of each micro-batch, short and long ones; a batch that an objective looks at as a
    whole stays in one process. Where layers are sharded all run as many passes, so one without rows runs one for
    nothing.
    """
    ranks = world()
    if not _rows_apart(stage):
        return update, []
    if getattr(stage.objective, "distractors", ()):
        parts = [batch if number % ranks.size == ranks.rank else [] for number, batch in enumerate(update)]
    else:
        lengths = stage.sampling.lengths
        parts = [sorted(batch, key=lengths.__getitem__)[ranks.rank :: ranks.size] for batch in update]
    if not shard_of(stage.model):
        return [part for part in parts if part], []
    idle = [batch[:1] for batch, part in zip(update, parts, strict=True) if not part]
    waiting = iter(idle)
    return [part or next(waiting) for part in parts], idle


def _rows_apart(stage: Stage) -> bool:
    """Tell whether there are several processes and each runs rows of its own.

    All run all rows where their passes could differ in number.

    Layers that are split run the same rows in all processes. Layers that are sharded run the same number of passes,
    which the forest makes of any rows, but for positions that depend on the longest row.
    """
    if world().size == 1:
        return False
    sharded = shard_of(stage.model)
    if not sharded:
        return True
    forest = cast(Any, stage.objective).engine.name == "forest"
    return sharded == "fsdp" and forest and facts_of(cast(Any, stage.model)).rope_changes_at is None


def _add_up(steps: Sequence[Step]) -> None:
    """Sum the gradients, losses and problems of updates over all processes, in one exchange."""
    ranks = world()
    leaves = [leaf for step in steps for leaf in step.leaves]
    parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    numbers = [[step.sums.loss, step.sums.penalty, float(step.problem is not None)] for step in steps]
    known = [[float(leaf.grad is not None) for leaf in leaves], *numbers]
    flat = torch.cat([*(part.flatten() for part in parts), *(parts[0].new_tensor(each) for each in known)])
    ranks.add_up(flat)
    sizes = [part.numel() for part in parts]
    *summed, there, totals = torch.split(flat, [*sizes, len(leaves), 3 * len(steps)])
    for leaf, total, part, count in zip(leaves, summed, parts, there.tolist(), strict=True):
        leaf.grad = total.view_as(part) if count else None
    for step, (loss, penalty, problems) in zip(steps, totals.view(-1, 3).tolist(), strict=True):
        step.sums.loss, step.sums.penalty = loss, penalty
        if problems:
            step.problem = next(each for each in ranks.gather(step.problem) if each is not None)


def accumulate(steps: Sequence[Step], check_stop: Callable[[], None]) -> None:
    """Accumulate the gradients of updates over their micro-batches, those that mix in passes together."""
    groups: dict[object, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.mixes_with, []).append(step)
    for group in groups.values():
        with group[0].dropout():
            for joined in _passes(group):
                check_stop()
                _backward(joined)


def _backward(joined: Sequence[tuple[Step, list[int]]]) -> None:
    """Run micro-batches in one pass, and each alone where a loss is not finite: NaN reaches into others there."""
    together = world().size > 1 and shard_of(joined[0][0].stage.model)  # nobody leaves a pass to the others
    going = [(step, batch) for step, batch in joined if step.problem is None or together]
    if not going:
        return
    parts = _losses(going)
    if len(going) > 1 and not all(part.is_finite() for part in parts):
        for each in going:
            _backward([each])
        return
    total = [step.add(batch, part) for (step, batch), part in zip(going, parts, strict=True)]
    if going[0][0].problem is None or together:
        with passes_together(joined[0][0].stage.model):
            torch.stack(total).sum().backward()  # type: ignore[no-untyped-call]


def _passes(steps: Sequence[Step]) -> Iterator[list[tuple[Step, list[int]]]]:
    """Yield micro-batches that run as one pass: one of each step, as many as the limit allows."""
    limit = min(step.stage.sampling.max_tokens or JOINED_TOKENS for step in steps)
    for turn in zip_longest(*(step.update for step in steps)):
        joined: list[tuple[Step, list[int]]] = []
        rows = longest = 0
        for step, batch in zip(steps, turn, strict=True):
            if batch is None:
                continue
            rows, longest = rows + len(batch), max(longest, step.padded(batch))
            if joined and rows * longest > limit:
                yield joined
                joined, rows, longest = [], len(batch), step.padded(batch)
            joined.append((step, batch))
        yield joined


def _losses(joined: Sequence[tuple[Step, list[int]]]) -> list[BatchLoss]:
    """Run micro-batches in one pass, and return the loss of each."""
    parts = [step.rows(batch) for step, batch in joined]
    objective = joined[0][0].stage.objective  # the others' are the same
    whole = objective([row for rows, _ in parts for row in rows], [task for _, tasks in parts for task in tasks])
    return whole.divided([len(rows) for rows, _ in parts])


def passed(stage: Stage, batch: list[int]) -> None:
    """Run rows forward and backward as an update would, and keep nothing of it."""
    step = Step(stage, RunState(), [batch])
    accumulate([step], lambda: None)
    for parameter in stage.prompt.parameters():
        parameter.grad = None
    if step.problem is not None:
        raise step.problem


@contextmanager
def _dropout(module: Module, active: bool, seed: int) -> Iterator[None]:
    """Run a module with its dropout, seeded and leaving global randomness alone, or without any."""
    if not active:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module.train()
        try:
            yield
        finally:
            module.eval()


def _dropped_tokens(stage: Stage, state: RunState, prompts: Mapping[int, Prompt]) -> frozenset[int]:
    """Draw the virtual tokens of a prefix that an update leaves out, never the first, the attention sink."""
    share, count = stage.settings.token_dropout, max(prompt.prefix_tokens for prompt in prompts.values())
    draw = random.Random(f"token_dropout {stage.settings.seed} {state.update}")
    return frozenset(i for i in range(1, count) if share and draw.random() < share)


def _drops(prompt: PromptModule) -> bool:
    """Return whether a prompt has dropout of its own, as P-tuning's LSTM may have."""
    return any(getattr(module, "dropout", 0.0) for module in prompt.modules())


def _clip(stage: Stage, state: RunState) -> None:
    limit = stage.settings.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(stage.prompt.parameters(), limit)
    if not torch.isfinite(norm):
        raise TrainingError(f"{_where(state)}: the gradient is {norm.item()}; {_cause(stage)}")


def _not_finite(stage: Stage, state: RunState, batch: list[int], loss: BatchLoss) -> TrainingError:
    finite = torch.isfinite(loss.values)
    bad = sorted({batch[i] for i in loss.row_index[~finite].tolist()}) or batch
    rows = ", ".join(stage.name_of(i) for i in bad[:10]) + (" ..." if len(bad) > 10 else "")
    return TrainingError(
        f"{_where(state)}: the loss is not finite for {len(bad)} of {len(batch)} rows of the "
        f"batch (training rows {rows}); {_cause(stage)}"
    )


def _where(state: RunState) -> str:
    return f"update {state.update + 1} (epoch {state.epoch + 1})"


def _cause(stage: Stage) -> str:
    """Name the likely cause of a number that is not finite, and what to do."""
    with torch.no_grad():
        rms = stage.prompt.materialize().double().pow(2).mean().sqrt().item()
    relative = stage.learning_rate / stage.rms
    if not math.isfinite(rms) or rms > 100 * stage.rms:
        return (
            f"the prompt's rms grew to {rms:.3g} against {stage.rms:.3g} in the base "
            f"at learning rate {stage.learning_rate:.3g} ({relative:.3g} x that rms); "
            f"try {stage.usual_rate:.2g} or less"
        )
    return (
        f"the prompt itself is sound (rms {rms:.3g}, learning rate {relative:.3g} x the "
        "base's rms), so look at these rows, or use torch_dtype float32"
    )
