"""``prompt_tuning_init_method`` PROMPT in a whole run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from softprompt.cli.main import run
from softprompt.errors import ConfigError
from softprompt.prompts import PromptTuningInit
from softprompt.training import TuneSettings, TuningConfig, tune
from softprompt.training.examples import read_data
from softprompt.training.preparation import prepare

VERBALIZER = "this is : {{input}} ?"


@pytest.fixture
def source(llama, rows, tmp_path):
    tuning = {"num_virtual_tokens": 3}
    output = tmp_path / "source"
    tune(
        llama,
        rows,
        num_epochs=1,
        verbalizer=VERBALIZER,
        tuning_config=tuning,
        output=output,
        silence_progress_bars=True,
    )
    return output


def first_rows(base, rows, source, length):
    tuning = TuningConfig(
        num_virtual_tokens=length,
        prompt_tuning_init_method="PROMPT",
        prompt_tuning_init_prompt=str(source),
    )
    settings = TuneSettings(tuning_config=tuning, verbalizer=VERBALIZER)
    prepared = prepare(base, read_data(rows, None, settings), settings)
    return prepared.module.materialize().detach()


def test_a_run_starts_where_another_ended(llama, rows, source):
    from safetensors.torch import load_file

    own = load_file(source / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(first_rows(llama, rows, source, 3), own)
    assert torch.equal(first_rows(llama, rows, source, 5), torch.cat([own, own[:2]]))


def test_too_small_a_shared_vocabulary_is_refused(bases, rows, source):
    with pytest.raises(ConfigError, match="share, too few; start from RANDOM"):
        first_rows(bases / "bart", rows, source, 4)


def test_the_whole_command(llama, rows, source, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    options = ["--base-model", str(llama), "--train-data", str(data), "--num-epochs", "1"]
    options += ["--verbalizer", VERBALIZER, "--num-virtual-tokens", "3", "--output", str(output)]
    options += ["--prompt-tuning-init-method", "PROMPT", "--prompt-tuning-init-prompt", str(source)]
    assert run(["tune", *options]) == 0
    assert f"the prompt starts from {source}" in capsys.readouterr().err
    record = json.loads((output / "softprompt.json").read_text())
    assert record["settings"]["tuning_config"]["prompt_tuning_init_prompt"] == str(source)
    # The prompt stands by itself: what it started from may go.
    shutil.rmtree(source)
    assert run(["evaluate", str(output), "--data", str(data)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_tuning_init_method": "PROMPT"},
            "'PROMPT', prompt_tuning_init_prompt can't be None",
        ),
        ({"prompt_tuning_init_prompt": "runs/a"}, "would be ignored with .*'RANDOM'"),
        (
            {"prompt_tuning_init_method": "PROMPT", "prompt_tuning_init_text": "a"},
            "prompt_tuning_init_text would be ignored",
        ),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        TuneSettings(tuning_config=options)


def test_the_enumeration_means_the_same():
    given = TuningConfig(prompt_tuning_init_method=PromptTuningInit.PROMPT, prompt_tuning_init_prompt="runs/a")
    assert given.prompt_tuning_init_method == "PROMPT"
