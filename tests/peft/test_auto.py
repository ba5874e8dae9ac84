"""Base and prompt in one call, from folders alone."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch

import softprompt
from oracles.peft_pair import TASKS, base, batch
from oracles.slow import only
from softprompt import AutoPeftModel, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from softprompt.artifacts import outside
from softprompt.errors import ArtifactError, ConfigError, FingerprintError

AUTO = {
    "CAUSAL_LM": softprompt.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": softprompt.AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": softprompt.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": softprompt.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": softprompt.AutoPeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": softprompt.AutoPeftModelForFeatureExtraction,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return, for each task, a prompted model and the folder of its prompt."""
    made = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        base(task).save_pretrained(folder / "base")
        model = TASKS[task][0].from_pretrained(folder / "base")
        prompted = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=3)).eval()
        prompted.save_pretrained(folder / "prompt")
        made[task] = prompted, folder / "prompt"
    return made


@pytest.mark.parametrize("task", only(["CAUSAL_LM", "SEQ_2_SEQ_LM"], TASKS))
def test_every_task(task, saved):
    prompted, folder = saved[task]
    for auto in (AUTO[task], AutoPeftModel):
        loaded = auto.from_pretrained(folder)
        assert type(loaded) is type(prompted)
        assert loaded.num_parameters(only_trainable=True) == 0
        assert torch.equal(loaded.eval()(**batch(task))[0], prompted(**batch(task))[0])


@pytest.mark.parametrize("task", TASKS)
def test_the_wrong_class_is_refused(task, saved):
    wrong = AUTO["SEQ_CLS" if task != "SEQ_CLS" else "CAUSAL_LM"]
    with pytest.raises(ConfigError, match=f"{wrong.__name__} loads task_type {wrong.task}, .* for {task}$"):
        wrong.from_pretrained(saved[task][1])


def test_another_base_is_used_when_told_so(saved, tmp_path):
    folder = saved["CAUSAL_LM"][1]
    config = json.loads((folder / "adapter_config.json").read_text())
    other = TASKS["CAUSAL_LM"][0].from_pretrained(config["base_model_name_or_path"])
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(folder, tmp_path / "prompt")
    config["base_model_name_or_path"] = str(tmp_path / "other")
    (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps(config))
    for auto in (AUTO["CAUSAL_LM"], AutoPeftModel):
        with pytest.raises(FingerprintError, match=r"other, another model: .*pass ignore_fingerprint=True"):
            auto.from_pretrained(tmp_path / "prompt")
        loaded = auto.from_pretrained(tmp_path / "prompt", ignore_fingerprint=True)
        assert loaded.active_adapter == "default"


def test_options_reach_base_and_prompt(saved):
    loaded = AutoPeftModel.from_pretrained(
        saved["CAUSAL_LM"][1], adapter_name="mine", is_trainable=True, dtype=torch.bfloat16
    )
    assert loaded.base_model.dtype is torch.bfloat16
    assert loaded.prompt_encoder["mine"].embedding.weight.dtype is torch.float32
    assert loaded.num_parameters(only_trainable=True) == 3 * 32


def test_a_prompt_that_names_no_base_is_explained(tmp_path):
    prompted = get_peft_model(base("CAUSAL_LM"), PromptTuningConfig(num_virtual_tokens=3))
    prompted.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"use PeftModel\.from_pretrained"):
        AutoPeftModel.from_pretrained(tmp_path)
    assert isinstance(PeftModel.from_pretrained(base("CAUSAL_LM"), tmp_path), PeftModel)


def test_a_missing_prompt_is_explained(tmp_path):
    with pytest.raises(ArtifactError, match="adapter_config"):
        AutoPeftModel.from_pretrained(tmp_path)


def test_the_class_is_not_instantiated():
    with pytest.raises(ConfigError, match="call its from_pretrained"):
        AutoPeftModel()


def test_there_is_one_for_every_task():
    assert {str(task) for task in TaskType} == set(AUTO)


def test_a_base_inside_the_prompts_folder_is_not_loaded_unasked(saved, tmp_path):
    folder = saved["CAUSAL_LM"][1]
    shutil.copytree(folder, tmp_path / "prompt")
    shutil.copytree(folder.parent / "base", tmp_path / "prompt" / "base")
    (tmp_path / "prompt" / "softprompt.json").unlink()  # it names the base too
    config = json.loads((folder / "adapter_config.json").read_text())
    for inside in ("./base", str(tmp_path / "prompt" / "base")):
        config["base_model_name_or_path"] = inside
        (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps(config))
        for load in (AutoPeftModel.from_pretrained, softprompt.load):
            with pytest.raises(ArtifactError, match="inside its own folder"):
                load(tmp_path / "prompt")


def test_a_name_is_no_base_inside_the_folder_that_one_works_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert outside("org/name", ".") == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="inside its own folder"):
        outside("org/name", ".")


def test_a_base_that_brings_code_along_is_not_run(saved, tmp_path, monkeypatch):
    folder = saved["CAUSAL_LM"][1]
    shutil.copytree(folder, tmp_path / "prompt")
    shutil.copytree(folder.parent / "base", tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "base" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoPeftModel.from_pretrained(tmp_path / "prompt")
    assert not (tmp_path / "ran").exists()
