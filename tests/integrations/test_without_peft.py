"""Where PEFT is not installed: checkpoints by ``softprompt.as_peft``, plain training without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SCRIPT = """
{first}
import json, os, sys
import torch, transformers as tf
from softprompt import PromptTuningConfig, get_peft_model
from accelerate.utils import is_peft_model
tf.logging.set_verbosity_error()

folder, options = sys.argv[1], json.loads(sys.argv[2])

def train(resume=None, epochs=2, **more):
    torch.manual_seed(0)
    base = tf.GPT2LMHeadModel(tf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, attn_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ))
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids = [torch.randint(0, 64, (8,)).tolist() for _ in range(8)]
    data = [{{"input_ids": row, "attention_mask": [1] * 8, "labels": row}} for row in ids]
    arguments = tf.TrainingArguments(
        folder, per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, **options,
    )
    class Stop(tf.TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            control.should_training_stop = True
    trainer = tf.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[Stop()] if epochs == 1 else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer

{body}
"""


def run(tmp_path, body, *, first="import softprompt.as_peft", **options):
    """Run a script without PEFT and return the JSON of its last line."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(first=first, body=body))
    return run_script(script, str(tmp_path / "out"), json.dumps(options))


def run_script(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(HERE / "without_peft.py"), str(script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_served_as_peft_trainer_saves_resumes_and_restores_the_adapter(tmp_path):
    body = """
whole, _ = train()
_, cut = train(epochs=1)
resumed, trainer = train(resume=True)
weights = [m.prompt_encoder["default"].embedding.weight for m in (whole, resumed)]
import peft
from peft.tuners.tuners_utils import BaseTunerLayer
print(json.dumps({
    "equal": torch.equal(*weights), "recognised": is_peft_model(whole), "version": peft.__version__,
    "is_ours": peft.PeftModel is __import__("softprompt").PeftModel, "tuner": isinstance(whole, BaseTunerLayer),
    "files": sorted(os.listdir(os.path.join(folder, "checkpoint-4"))),
    "labels": trainer.label_names, "loss": trainer.evaluate()["eval_loss"],
}))
"""
    found = run(tmp_path, body, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
    assert found["equal"] and found["recognised"] and found["is_ours"] and not found["tuner"]
    assert found["labels"] == ["labels"] and 0 < found["loss"] < 10
    assert "adapter_model.safetensors" in found["files"] and "model.safetensors" not in found["files"]


@pytest.mark.slow
def test_without_that_line_a_model_trains_and_evaluates(tmp_path):
    body = """
model, trainer = train()
print(json.dumps({
    "recognised": is_peft_model(model), "labels": trainer.label_names, "loss": trainer.evaluate()["eval_loss"],
    "peft": "peft" in sys.modules, "accepts": trainer.model_accepts_loss_kwargs,
}))
"""
    found = run(tmp_path, body, first="", save_strategy="no", eval_strategy="epoch")
    assert not found["recognised"] and not found["peft"] and found["labels"] == ["labels"]
    assert 0 < found["loss"] < 10 and found["accepts"]


@pytest.mark.parametrize(
    ("first", "refused"),
    [
        pytest.param(
            "import transformers.trainer_utils",
            {"import softprompt.as_peft": "before all other imports"},
            marks=pytest.mark.slow,
        ),
        (
            "import sys; sys.modules['transformers.trainer_utils'] = sys",
            {"import softprompt.as_peft": "before all other imports"},
        ),
        (
            "import softprompt.as_peft, peft",
            {
                "peft.LoraConfig(r=4)": "LoraConfig is PEFT's",
                "peft.merge_everything": "served as peft, has no merge_everything",
                # what transformers' load_adapter calls
                "from peft.utils.other import build_peft_weight_mapping as build; build()": (
                    "load no prompts, of PEFT's neither: load them with softprompt.AutoPeftModelFor"
                ),
            },
        ),
    ],
    ids=["late", "as if late", "in time"],
)
def test_what_is_refused(tmp_path, first, refused):
    script, lines = tmp_path / "script.py", [first, "import json", "said = []"]
    for line in refused:
        lines += ["try:", f"    {line}", "except Exception as error:", "    said.append(str(error))"]
    script.write_text("\n".join([*lines, "print(json.dumps(said))"]))
    for said, expected in zip(run_script(script), refused.values(), strict=True):
        assert expected in said


def test_the_harness_hides_peft(tmp_path):
    """What the other tests stand on."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, importlib.util, importlib.metadata\n"
        "names = [d.metadata['Name'] for d in importlib.metadata.distributions(name='peft')]\n"
        "print(json.dumps([importlib.util.find_spec('peft') is None, names]))\n"
    )
    assert run_script(script) == [True, []]


def test_where_peft_is_installed_the_line_changes_nothing():
    import peft

    import softprompt.as_peft  # noqa: F401

    assert sys.modules["peft"] is peft and peft.LoraConfig.__module__.startswith("peft.")
