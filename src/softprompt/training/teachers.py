"""Teacher prompts: one plain prompt for each task, trained side by side in one forest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast, final

from torch import Tensor, nn

from softprompt.prompts import PromptModule, check_task


@final
class TeacherPrompts(PromptModule):
    """Several prompts that share nothing, under the interface of one with tasks."""

    def __init__(self, prompts: Sequence[PromptModule]) -> None:
        """Take over one prompt for each task."""
        super().__init__()
        self.prompts = nn.ModuleList(prompts)
        self.num_tasks = len(prompts)
        self.config = prompts[0].config

    def materialize(self, task: int = 0) -> Tensor:
        """Return the rows ``[S·P, H]`` of a task's own prompt; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        return cast(PromptModule, self.prompts[task]).materialize()

    def stored(self) -> dict[str, Tensor]:
        """Return every parameter by its name; see ``PromptModule``."""
        return {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``stored`` returned; see ``PromptModule``."""
        self.load_state_dict(dict(tensors))
