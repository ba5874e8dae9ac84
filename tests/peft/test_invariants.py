"""Training changes the prompt and its heads, and nothing else."""

from __future__ import annotations

import pytest
import torch

from oracles.families import CAUSAL
from oracles.peft_pair import TASKS, base, batch
from oracles.slow import only
from oracles.weights import weights_hash
from softprompt import PromptTuningConfig, get_peft_model


def loss_of(task, model):
    inputs = batch(task)
    if task == "TOKEN_CLS":
        inputs["labels"] = inputs["input_ids"] % 3
    if task == "QUESTION_ANS":
        inputs["start_positions"], inputs["end_positions"] = (
            torch.tensor([0, 1, 2]),
            torch.tensor([3, 4, 5]),
        )
    output = model(**inputs)
    return output.last_hidden_state.square().mean() if task == "FEATURE_EXTRACTION" else output.loss


def trained(task, *, seed=0, steps=5):
    model = base(task)
    before = weights_hash(model)
    torch.manual_seed(seed)
    prompted = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=3))
    prompted.add_adapter("idle", PromptTuningConfig(task_type=task, num_virtual_tokens=2))
    start = {name: value.detach().clone() for name, value in prompted.named_parameters()}
    # Every parameter is offered to the optimiser: freezing, not the caller's filter, protects the base.
    optimizer = torch.optim.AdamW(prompted.parameters(), lr=0.05, weight_decay=0.1)
    prompted.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(task, prompted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {n for n, value in prompted.named_parameters() if not torch.equal(value, start[n])}
    return prompted, before, moved, losses


@pytest.mark.parametrize("task", TASKS)
def test_the_base_never_changes(task):
    prompted, before, moved, _ = trained(task)
    heads = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
    expected = {"prompt_encoder.default.embedding.weight"}
    if task in heads:
        path = f"base_model.{heads[task]}.modules_to_save.default"
        expected |= {f"{path}.weight", f"{path}.bias"}
    assert moved == expected
    assert {n for n, p in prompted.named_parameters() if p.requires_grad} == expected
    assert all(p.grad is None for p in prompted.parameters() if not p.requires_grad)
    assert weights_hash(prompted.detach()) == before


@pytest.mark.parametrize("task", only(["CAUSAL_LM"], ["CAUSAL_LM", "SEQ_CLS"]))
def test_a_seed_decides_the_run(task):
    rows, losses = [], []
    for seed in (0, 0, 1):
        prompted, _, _, history = trained(task, seed=seed, steps=2)
        rows.append(prompted.prompt_encoder["default"].embedding.weight.detach())
        losses.append(history)
    assert torch.equal(rows[0], rows[1])
    assert losses[0] == losses[1]
    assert not torch.equal(rows[0], rows[2])


def test_the_loss_goes_down():
    *_, losses = trained("CAUSAL_LM", steps=8)
    assert losses[-1] < losses[0]


def test_a_frozen_base_in_bfloat16_stays_bitwise_equal():
    import transformers as tf

    from oracles.families import build

    model = build(tf.AutoModelForCausalLM, CAUSAL["llama"]()).to(torch.bfloat16)
    before = weights_hash(model)
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    optimizer = torch.optim.SGD([p for p in prompted.parameters() if p.requires_grad], lr=1e-4)
    start = prompted.prompt_encoder["default"].embedding.weight.detach().clone()
    loss_of("CAUSAL_LM", prompted).backward()
    optimizer.step()
    weight = prompted.prompt_encoder["default"].embedding.weight
    assert weight.dtype is torch.float32
    assert not torch.equal(weight, start)
    assert weights_hash(prompted.detach()) == before
