"""Learning from teachers: likelihood + weight * (KL of the answers + distance of hidden states).

Source: Wang et al. 2023, multitask prompt tuning (arXiv:2303.02861).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch.nn.functional import kl_div, mse_loss

from softprompt.engine import Engine, EngineRow
from softprompt.prompts import PromptModule
from softprompt.training.objective import Scored


@final
@dataclass(frozen=True, slots=True)
class Distillation:
    """The likelihood of the targets, and what a teacher prompt for each task would have answered.

    Attributes:
        engine: Runs rows; its ``target_outputs`` gives logits and hidden states.
        teachers: One prompt for each task, not trained any more.
        weight: How much the teachers count against the likelihood.
    """

    engine: Engine
    teachers: PromptModule
    weight: float

    def __call__(self, rows: Sequence[EngineRow], tasks: Sequence[int]) -> Scored:
        """Score rows; see ``Objective``. All sums are over the target tokens of the rows."""
        student = self.engine.target_outputs(rows)
        with torch.no_grad():
            prompts = {task: self.teachers.prompt(task) for task in sorted(set(tasks))}
            taught = [
                replace(row, prompt=prompts[task]) for row, task in zip(rows, tasks, strict=True)
            ]
            teacher = self.engine.target_outputs(taught)
        log_p = student.logits.float().log_softmax(dim=-1)  # [M, V]
        wanted = teacher.logits.float().log_softmax(dim=-1)
        divergence = kl_div(log_p, wanted, log_target=True, reduction="sum")
        distance = mse_loss(student.hidden.float(), teacher.hidden.float(), reduction="none")
        chosen = log_p.gather(1, student.labels[:, None])[:, 0]
        penalty = self.weight * (divergence + distance.mean(dim=-1).sum())
        return Scored(chosen, student.row_index, penalty)
