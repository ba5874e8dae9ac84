"""Initialisations chosen by the data, the default and ``AUTO``: what each becomes, and that the run is its own."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles import families
from oracles.tokenizers import CHATML, chat_bpe
from softprompt.cli.main import run
from softprompt.errors import ConfigError
from softprompt.training import TuneSettings, TuningConfig, read_run, tune
from softprompt.training.keywords import full_names

QUICK = {"max_steps": 2, "batch_size": 4, "silence_progress_bars": True}


def tuning(**values):
    return {"num_virtual_tokens": 3, **values}


def record(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_labels_are_taken_and_peft_loads_what_came_of_it(llama, rows, tmp_path, caplog):
    caplog.set_level("INFO", "softprompt")
    found = tune(llama, rows, output=tmp_path / "a", init="auto", tuning_config=tuning(), **QUICK)
    given = tune(llama, rows, init="LABELS", tuning_config=tuning(), **QUICK)
    assert torch.equal(found.module.embedding.weight, given.module.embedding.weight)
    assert "the prompt starts from LABELS: 2 labels" in caplog.text
    assert record(tmp_path / "a")["prompt_tuning_init"] == "LABELS"
    assert found.manifest.settings["tuning_config"]["prompt_tuning_init_method"] == "LABELS"
    assert read_run(tmp_path / "a" / "run.toml")["tuning_config"]["prompt_tuning_init_method"] == "AUTO"
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "a")
    weights = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(weights, found.module.embedding.weight)


@pytest.mark.parametrize(
    ("options", "settings", "method", "text"),
    [
        ({}, {"prompt_tuning_init_text": "bad film"}, "TEXT", "bad film"),
        ({"verbalizer": "is this good ?\n {{input}} : "}, {}, "TEXT", "is this good ? :"),
        ({"verbalizer": "{{input}} -> "}, {}, "SAMPLE_VOCAB", None),
    ],
)
def test_without_labels_the_text_then_the_templates_words(llama, rows, options, settings, method, text):
    options = options | QUICK | {"task": "generation"}
    found = tune(llama, rows, init="auto", tuning_config=tuning(**settings), **options)
    assert (str(found.config.prompt_tuning_init), found.config.prompt_tuning_init_text) == (method, text)
    chosen = found.manifest.settings["tuning_config"]
    given = tune(llama, rows, tuning_config=chosen, **options)
    assert torch.equal(found.module.embedding.weight, given.module.embedding.weight)


def test_labels_without_room_are_refused_by_name_and_passed_over_by_auto(llama, rows, caplog):
    caplog.set_level("INFO", "softprompt")
    one = {"num_virtual_tokens": 1}
    with pytest.raises(ConfigError, match="virtual token for each of the 2 labels, num_virtual_tokens is 1"):
        tune(llama, rows, init="labels", tuning_config=one, **QUICK)
    found = tune(llama, rows, init="auto", tuning_config=one, **QUICK)
    assert found.config.prompt_tuning_init == "SAMPLE_VOCAB"
    assert "2 labels are more than the 1 virtual tokens" in caplog.text


def test_a_chat_base_starts_from_what_its_template_says(tmp_path, caplog):
    caplog.set_level("INFO", "softprompt")
    chats = [{"prompt": "good film", "completion": "yes it was"}, {"prompt": "bad film", "completion": "no , poor"}]
    families.causal("llama", vocab_size=330).save_pretrained(tmp_path)
    chat_bpe().save_pretrained(tmp_path)
    found = tune(tmp_path, chats, init="auto", tuning_config=tuning(), **QUICK)
    assert found.config.prompt_tuning_init == "TEXT"
    assert "user" in found.config.prompt_tuning_init_text
    assert "<" not in found.config.prompt_tuning_init_text


def test_a_chat_template_that_takes_no_empty_turn_gives_no_words(tmp_path, caplog):
    caplog.set_level("INFO", "softprompt")
    chats = [{"prompt": "good film", "completion": "yes it was"}, {"prompt": "bad film", "completion": "no , poor"}]
    families.causal("llama", vocab_size=330).save_pretrained(tmp_path)
    refusing = "{% if not messages[0]['content'] %}{{ raise_exception('empty') }}{% endif %}" + CHATML
    chat_bpe(refusing).save_pretrained(tmp_path)
    found = tune(tmp_path, chats, init="auto", tuning_config=tuning(), **QUICK)
    assert found.config.prompt_tuning_init == "SAMPLE_VOCAB"


def test_source_training_starts_shared_prompt_and_teachers_from_their_labels(llama, rows):
    both = {"one": rows, "two": [{"input": each["input"], "output": "film"} for each in rows[:6]] + rows[:2]}
    found = tune(llama, both, method="multitask", init="auto", tuning_config=tuning(), **QUICK)
    assert found.config.prompt_tuning_init == "LABELS"


def test_other_methods_have_no_such_start_and_two_names_are_refused(llama):
    with pytest.raises(ConfigError, match="init_method would be ignored with tuning_type PREFIX_TUNING"):
        TuneSettings.from_dict({"method": "prefix", "init": "auto"})
    with pytest.raises(ConfigError, match="are the same setting"):
        full_names({"init": "auto", "tuning_config": {"prompt_tuning_init_method": "TEXT"}})
    with pytest.raises(ConfigError, match="are the same setting"):
        full_names({"init": "auto", "tuning_config": TuningConfig(prompt_tuning_init_method="SAMPLE_VOCAB")})
    both = full_names({"init": "auto", "tuning_config": TuningConfig(num_virtual_tokens=3)})
    assert both == {"tuning_config": {"num_virtual_tokens": 3, "prompt_tuning_init_method": "AUTO"}}


def test_the_command_line_has_a_short_name_for_it(llama, rows, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--base-model", llama, "--train-data", data, "--num-virtual-tokens", 3, "--max-steps", 1, "--quiet"]
    assert run(["tune", *map(str, words), "--init", "auto", "--output", str(tmp_path / "out")]) == 0
    assert record(tmp_path / "out")["prompt_tuning_init"] == "LABELS"


@pytest.mark.parametrize(
    ("task", "options", "init"),
    [
        ("classification", {}, "RANDOM_SCALED"),
        ("generation", {}, "SAMPLE_VOCAB"),
        ("generation", {"method": "multitask"}, "RANDOM_SCALED"),
    ],
)
def test_the_default_is_a_normal_draw_for_labels_and_sampled_vocabulary_for_texts(
    llama, rows, task, options, init, caplog
):
    caplog.set_level("INFO", "softprompt")
    data = {"one": rows, "two": rows} if options else rows
    found = tune(llama, data, task=task, tuning_config=tuning(), **options, **QUICK)
    assert found.config.prompt_tuning_init == init
    assert ("starts from SAMPLE_VOCAB, the default where targets are no labels" in caplog.text) == (
        init == "SAMPLE_VOCAB"
    )
    named = {"RANDOM_SCALED": "RANDOM"}.get(init, init)
    assert found.manifest.settings["tuning_config"]["prompt_tuning_init_method"] == named
    given = tune(llama, data, task=task, init=named, tuning_config=tuning(), **options, **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(found.module.parameters(), given.module.parameters(), strict=True))
