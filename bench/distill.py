"""A training token of a distillation: softprompt's loop against the loop of PEFT's example, as ratios.

PEFT's `examples/cartridge_self_study` trains a cartridge with one conversation in a step. In each step the teacher
reads document and conversation anew, logits of the whole vocabulary are made for all of them, and the loss is the
cross-entropy to the teacher's 20 likeliest tokens at every position of the conversation. That loop is written here
without its Trainer, so without what a Trainer costs. Ours predicts the teacher's 20 likeliest tokens once for each
conversation, the document once for a batch, and trains on them for several epochs; a conversation's share of the
teacher's pass is counted. A training token is a token of an answer; conversations are the same on both sides.

Random weights in the shape of SmolLM2-135M, one thread, both in one process and alternating. FLOPs come from
torch's counter and have no noise; seconds are CPU seconds of the process.

    python bench/distill.py [--document 1024] [--rows 8] [--layers 30] [--epochs 8] [--rounds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch.nn import functional as F

import softprompt
from alone import alone
from softprompt.backbone import Base
from softprompt.distillation.teacher import targets_of
from softprompt.engine import EngineRow, build_engine
from softprompt.prompts import Prompt
from softprompt.training import TopDivergence
from training_step import count, llama_135m, torch_step

QUESTION, ANSWER, TOP_K = 30, 70, 20


def by_peft(model: Any, virtual: int, document: list[int], rows: list[EngineRow]) -> Callable[[], None]:
    """Return steps of the example's loop over some rows, one row in each."""
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual, num_frozen_tokens=1)
    student = peft.get_peft_model(model, config)

    def step(row: EngineRow) -> None:
        conversation = [*row.source, *row.target]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([document + conversation]), use_cache=False).logits[0]
        length = len(conversation) - 1
        own = student(input_ids=torch.tensor([conversation]), use_cache=False).logits[0, :length]
        teacher = logits[len(document) : len(document) + length]
        ids = teacher.topk(TOP_K, dim=-1).indices
        wanted = F.log_softmax(teacher, dim=-1).gather(-1, ids).exp()
        loss = -(wanted * F.log_softmax(own, dim=-1).gather(-1, ids)).sum(dim=-1).mean()
        student.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    def steps() -> None:
        for row in rows:
            step(row)

    return steps


def by_us(
    model: Any, virtual: int, document: list[int], rows: list[EngineRow]
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Return the teacher's pass over some rows, and one step that trains on them."""
    base = Base(model)
    engine = build_engine(base)
    embedded = model.get_input_embeddings()(torch.tensor(document)).detach()
    text = Prompt(input=embedded)
    read = [EngineRow(row.source, row.target, text) for row in rows]
    teacher = partial(targets_of, engine, read, k=TOP_K, batch_size=len(rows), check_stop=lambda: None)
    config = softprompt.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    module = softprompt.get_peft_model(model, config).encoder_of("default")
    keys = [(row.source, row.target) for row in rows]
    objective = TopDivergence(engine, dict(zip(keys, teacher(), strict=True)), {})

    def step() -> None:
        prompt = module.prompt()
        own = [EngineRow(row.source, row.target, prompt) for row in rows]
        module.zero_grad()
        objective(own, [0] * len(own)).loss.backward()  # type: ignore[no-untyped-call]

    return teacher, step


def seconds(run: Callable[[], Any]) -> float:
    """Return the CPU seconds of a run."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both loops, alternating."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = llama_135m()
    del model.model.layers[arguments.layers :]
    model.config.num_hidden_layers = arguments.layers
    model.eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(10, model.config.vocab_size, (count,), generator=draw).tolist()

    document = ids(arguments.document)
    rows = [EngineRow(tuple(ids(QUESTION)), tuple(ids(ANSWER))) for _ in range(arguments.rows)]
    few = rows[: arguments.peft_rows]
    theirs = by_peft(model, arguments.virtual, document, few)
    teacher, step = by_us(model, arguments.virtual, document, rows)

    def each(measure: Callable[[Callable[[], Any]], float]) -> tuple[float, float, float]:
        """Return what a conversation costs there, here, and of that the teacher's share."""
        share = measure(teacher) / len(rows) / arguments.epochs
        return measure(theirs) / len(few), measure(step) / len(rows) + share, share

    for run in (theirs, teacher, step):  # what a first pass sets up is no part of a step
        run()
    counted = each(lambda run: count(torch_step(run)))
    timed = [each(seconds) for _ in range(arguments.rounds)]
    ratios = sorted(there / here for there, here, _ in timed)
    return {
        "document": arguments.document,
        "conversation": QUESTION + ANSWER,
        "virtual_tokens": arguments.virtual,
        "rows": arguments.rows,
        "epochs": arguments.epochs,
        "gflops_per_training_token": [each / ANSWER / 1e9 for each in counted[:2]],
        "flops_ratio": counted[0] / counted[1],
        "teachers_share_of_ours": counted[2] / counted[1],
        "seconds_per_training_token": [min(each[i] for each in timed) / ANSWER for i in (0, 1) if timed],
        "seconds_ratio": [ratios[0], ratios[-1]] if ratios else None,
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("document", 1024),
        ("layers", 30),
        ("virtual", 128),
        ("rows", 8),
        ("epochs", 8),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peft-rows", type=int, default=2, help="conversations of PEFT's loop in a round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measured(arguments)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    alone()
    main()
