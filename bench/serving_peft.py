"""What a PEFT user serves with: one `generate` for each prompt's waiting requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from serving_work import OUTPUT, Ask, Took
from softprompt.engine import pad_rows


class Clock(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Notes when each token of a batch is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Note the time."""
        self.times.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class PeftServer:
    """A PEFT model with several prompts; one of them is active at a time."""

    def __init__(self, model: Any, tables: Sequence[Tensor]) -> None:
        from peft import PromptTuningConfig, get_peft_model

        self.model: Any = None
        for i, table in enumerate(tables):
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=table.shape[0])
            if self.model is None:
                self.model = get_peft_model(model, config, f"prompt{i}")
            else:
                self.model.add_adapter(f"prompt{i}", config)
            self.model.prompt_encoder[f"prompt{i}"].embedding.weight.data.copy_(table)
        self.model.eval()

    @torch.no_grad()
    def batch(self, batch: Sequence[Ask], asked: Sequence[float]) -> list[Took]:
        """Answer requests of one prompt, padded on the left to the longest of them."""
        self.model.set_adapter(f"prompt{batch[0].prompt}")
        ids, mask = pad_rows([each.ids for each in batch], left=True, pad_id=0)
        clock = Clock()
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=OUTPUT,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        new = found[:, -OUTPUT:].tolist()
        return [
            Took(tuple(row), [moment - began for moment in clock.times])
            for row, began in zip(new, asked, strict=True)
        ]

    def one_by_one(self, todo: Sequence[Ask]) -> list[Took]:
        """Answer requests alone, each asked for when the one before it is answered."""
        return [self.batch([ask], [time.process_time()])[0] for ask in todo]

    def by_prompt(self, todo: Sequence[Ask], clients: int, *, largest: bool) -> list[Took]:
        """Answer a group of waiting requests for one prompt, again and again.

        Clients ask their next question as soon as they are answered, so that as many wait as there
        are clients. The largest group first gives the most tokens a second and lets rare prompts wait;
        the group that waited longest first is fair.
        """
        start = time.process_time()
        waiting = [(i, start) for i in range(min(clients, len(todo)))]
        following = len(waiting)
        took: dict[int, Took] = {}
        while waiting:
            groups: dict[int, list[tuple[int, float]]] = {}
            for i, began in waiting:
                groups.setdefault(todo[i].prompt, []).append((i, began))
            # Groups are in the order of their oldest requests, as ``waiting`` is.
            chosen = max(groups.values(), key=len) if largest else next(iter(groups.values()))
            answers = self.batch([todo[i] for i, _ in chosen], [began for _, began in chosen])
            took.update(zip([i for i, _ in chosen], answers, strict=True))
            now = time.process_time()
            waiting = [each for each in waiting if each not in chosen]
            more = range(following, min(following + len(chosen), len(todo)))
            waiting += [(i, now) for i in more]
            following += len(more)
        return [took[i] for i in range(len(todo))]
