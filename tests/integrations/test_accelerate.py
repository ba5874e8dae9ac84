"""Two processes on one machine: ``accelerate launch`` with Trainer, and with a loop of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import softprompt
from oracles.families import causal

P = 4

COMMON = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers as tf
import softprompt
from accelerate import Accelerator
base = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1])
folder = sys.argv[2]
config = softprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
torch.manual_seed(0)
model = softprompt.get_peft_model(base, config)
ids = torch.arange(3, 35).view(4, 8)
"""

LOOP = """
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
loader = torch.utils.data.DataLoader(ids, batch_size=2)
wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
wrapped.train()
for _ in range(2):
    for batch in loader:
        labels = batch.clone()
        labels[:, 0] = -100
        loss = wrapped(input_ids=batch, labels=labels).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
accelerator.wait_for_everyone()
plain = accelerator.unwrap_model(wrapped)
assert type(plain) is softprompt.PeftModelForCausalLM
plain.save_pretrained(folder, is_main_process=accelerator.is_main_process)
assert accelerator.num_processes == 2
"""

TRAINER = """
rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids.tolist()]
arguments = tf.TrainingArguments(
    folder, per_device_train_batch_size=2, num_train_epochs=2, learning_rate=1.0, optim="sgd", report_to=[],
    use_cpu=True, disable_tqdm=True, save_strategy="epoch", lr_scheduler_type="constant", max_grad_norm=0.0,
    train_sampling_strategy="sequential",
)
trainer = tf.Trainer(model, arguments, train_dataset=rows)
trainer.train()
trainer.save_model(folder)
assert trainer.args.world_size == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("body", [pytest.param(LOOP, id="loop"), pytest.param(TRAINER, id="trainer")])
def test_two_processes_train_as_one(tmp_path, body):
    base = causal("llama")
    base.save_pretrained(tmp_path / "base")
    script = tmp_path / "script.py"
    script.write_text(COMMON + body)
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path / "base"), str(tmp_path / "prompt")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(found, in_one_process(tmp_path / "base"), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == P


def in_one_process(folder):
    """The same updates: both halves of the rows make one batch."""
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model = softprompt.get_peft_model(
        base, softprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    )
    ids = torch.arange(3, 35).view(4, 8)
    labels = ids.clone()
    labels[:, 0] = -100  # Trainer does not count a row's first token, which a prompt predicts
    weight = model.prompt_encoder["default"].embedding.weight
    for _ in range(2):
        weight.grad = None
        model.eval()(input_ids=ids, labels=labels).loss.backward()
        weight.data -= weight.grad
    return weight.detach()
