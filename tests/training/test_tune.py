import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oracles.slow import only
from oracles.weights import weights_hash
from softprompt import AutoPeftModelForCausalLM
from softprompt.backbone import Base
from softprompt.errors import (
    ArtifactError,
    BackboneError,
    ConfigError,
    ContextOverflowError,
    DataError,
    OutputExistsError,
    TemplateError,
    TrainingError,
    UsageError,
)
from softprompt.inference import load
from softprompt.training import read_run, tune
from softprompt.training.settings import RATE_PER_RMS

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "run.toml",
    "softprompt.json",
    "training_curve.png",
    "training_logs.jsonl",
}
QUICK = {"num_epochs": 2, "batch_size": 4, "tuning_config": {"num_virtual_tokens": 3}}


def prompt_of(tuned):
    return tuned.module.embedding.weight.detach()


@pytest.mark.parametrize("base", only(["bart"], ["llama", "bart"]))
def test_tuning_lowers_the_loss_and_answers(bases, rows, held_out, base):
    tuned = tune(bases / base, rows, held_out, **(QUICK | {"num_epochs": 8}), lr=0.5)
    losses = [point["loss"] for point in tuned.history]
    assert losses[-1] < losses[0]
    assert tuned.labels == ("no", "yes")
    assert tuned("the film was good") in tuned.labels
    assert tuned.manifest.seq2seq is (base == "bart")
    assert tuned.metrics["updates"] == 8 * 6
    assert tuned.metrics["validation"] == tuned.history[tuned.metrics["epoch"] - 1]["validation"]
    best = max(point["validation"]["accuracy"] for point in tuned.history)
    assert tuned.metrics["validation"]["accuracy"] == best


@pytest.mark.parametrize("dropout", [False, True])
def test_only_the_prompt_changes(llama, rows, dropout):
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = weights_hash(model)
    base = Base(model, AutoTokenizer.from_pretrained(llama), str(llama))
    start = prompt_of(tune(base, rows, **(QUICK | {"num_epochs": 1}), lr=1e-30))
    tuned = tune(base, rows, **QUICK, keep_dropout=dropout)
    assert weights_hash(model) == before
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(prompt_of(tuned), start)


def test_the_seed_decides_and_the_global_generator_is_left_alone(llama, rows):
    torch.manual_seed(5)
    first = prompt_of(tune(llama, rows, **QUICK, keep_dropout=True))
    drawn = torch.rand(3)
    torch.manual_seed(6)
    again = prompt_of(tune(llama, rows, **QUICK, keep_dropout=True))
    other = prompt_of(tune(llama, rows, **QUICK, keep_dropout=True, seed=74))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("RANDOM", {}),
        ("STANDARD_NORMAL", {}),
        ("SAMPLE_VOCAB", {}),
        ("LABELS", {}),
        ("TEXT", {"prompt_tuning_init_text": "good film"}),
        (
            "TEXT",
            {"prompt_tuning_init_text": "good film", "prompt_tuning_init_special_tokens": False},
        ),
    ],
)
def test_what_a_prompt_starts_from(llama, rows, method, extra):
    config = {"num_virtual_tokens": 40, "prompt_tuning_init_method": method, **extra}
    tuned = tune(llama, rows, num_epochs=1, lr=1e-30, tuning_config=config)
    prompt = prompt_of(tuned)
    table = tuned.base.model.get_input_embeddings().weight.detach()
    nearest = torch.cdist(prompt, table).min(dim=1)
    rms = prompt.square().mean().sqrt().item()
    scale = table.square().mean().sqrt().item()
    ids = [tuned.tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    match method:
        case "RANDOM":
            assert rms == pytest.approx(scale, rel=0.15)
            assert nearest.values.min() > 0.1
        case "STANDARD_NORMAL":
            assert rms == pytest.approx(1, rel=0.15)
        case "SAMPLE_VOCAB":
            assert nearest.values.max() < 1e-3
            assert len(set(nearest.indices.tolist())) > 5
        case "LABELS":
            torch.testing.assert_close(prompt[:2], table[ids])
        case "TEXT" if not extra.get("prompt_tuning_init_special_tokens", True):
            ids = tuned.tokenizer("good film", add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(prompt, table[(ids * 40)[:40]])
        case "TEXT":
            words = tuned.tokenizer("good film")["input_ids"]
            torch.testing.assert_close(prompt, table[(words * 40)[:40]])


def test_labels_cannot_start_a_prompt_for_free_text(llama, rows):
    with pytest.raises(ConfigError, match="LABELS needs a classification task"):
        tune(llama, rows, task="generation", tuning_config={"prompt_tuning_init_method": "LABELS"})


def test_the_default_learning_rate_is_relative_to_the_embeddings(llama, rows, caplog):
    caplog.set_level("INFO", "softprompt")
    tuned = tune(llama, rows, **QUICK)
    table = tuned.base.model.get_input_embeddings().weight
    expected = RATE_PER_RMS * table.square().mean().sqrt().item()
    assert tuned.metrics["learning_rate"] == pytest.approx(expected, rel=1e-4)
    assert f"learning rate {expected:.4g}" in caplog.text
    assert tune(llama, rows, **QUICK, learning_rate=0.02).metrics["learning_rate"] == 0.02


def test_without_output_nothing_is_written(llama, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune(llama, rows, **QUICK)
    assert list(tmp_path.rglob("*")) == []


def test_the_output_is_complete_and_loads_to_the_same_answers(llama, rows, held_out, tmp_path):
    output = tmp_path / "deep" / "prompt"
    tuned = tune(llama, rows, held_out, output=output, **QUICK)
    assert {path.name for path in output.iterdir()} == FILES
    assert len((output / "training_logs.jsonl").read_text().splitlines()) == 12
    loaded = load(output)
    assert torch.equal(prompt_of(loaded), prompt_of(tuned))
    texts = [row["input"] for row in held_out]
    assert loaded(texts) == tuned(texts)
    manifest = json.loads((output / "softprompt.json").read_text())
    assert manifest["data"]["train"]["rows"] == 22
    assert manifest["settings"]["num_epochs"] == 2
    assert manifest["history"] == [dict(point) for point in tuned.history]


def test_the_runs_own_file_repeats_it(llama, rows, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = tune(llama, data, output=tmp_path / "a", **QUICK, lr=0.05, verbalizer="{{input}} ?")
    again = tune(**read_run(tmp_path / "a" / "run.toml"), output=tmp_path / "b")
    assert torch.equal(prompt_of(first), prompt_of(again))
    texts = [(tmp_path / name / "run.toml").read_text() for name in "ab"]
    assert texts[0] == texts[1]


def test_a_model_or_an_iterator_in_memory_will_do(llama, rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    tuned = tune(model, iter(rows), output=tmp_path / "a", **QUICK)
    assert tuned.manifest.data["train"]["path"] == "rows in memory"
    assert "# train_data was in memory" in (tmp_path / "a" / "run.toml").read_text()


def test_settings_of_batches_and_types_reach_the_run(llama, rows):
    tuned = tune(llama, rows, **QUICK, torch_dtype=torch.bfloat16, max_tokens_per_batch=30, device="cpu")
    assert tuned.manifest.dtype == "bfloat16"
    assert prompt_of(tuned).dtype == torch.float32


@pytest.mark.parametrize("optimizer", only(["adafactor"], ["adamw", "adafactor"]))
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_optimizer_and_schedule_trains(llama, rows, optimizer, schedule):
    tuned = tune(llama, rows, **(QUICK | {"num_epochs": 5}), optimizer=optimizer, schedule=schedule)
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]


def test_free_text_is_validated_by_its_loss(llama, rows, held_out):
    tuned = tune(llama, rows, held_out, task="generation", **QUICK)
    assert tuned.labels is None
    assert set(tuned.metrics["validation"]) == {"loss", "perplexity"}
    kept = tuned.history[tuned.metrics["epoch"] - 1]["validation"]["loss"]
    assert kept == min(point["validation"]["loss"] for point in tuned.history)


def test_without_validation_the_last_prompt_is_kept(llama, rows):
    tuned = tune(llama, rows, **QUICK)
    assert "validation" not in tuned.metrics
    assert tuned.metrics["epoch"] == tuned.metrics["epochs"] == 2


def test_a_failing_run_says_why_and_leaves_nothing(llama, rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    calls = []

    def spoil(module, inputs, logits):
        calls.append(1)
        return logits * float("nan") if len(calls) > 7 else logits

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(TrainingError, match=r"update \d+ \(epoch \d\): .* for 4 of 4 rows"):
        tune(model, rows, output=tmp_path / "out", engine="plain", **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_failing_run_leaves_the_prompt_it_was_to_overwrite(llama, rows, tmp_path):
    tune(llama, rows, output=tmp_path / "out", **QUICK)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError):
        tune(model, rows, output=tmp_path / "out", overwrite=True, engine="plain", **QUICK)
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after == before


@pytest.mark.parametrize("below", ["", "new/deeper"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, below):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(ArtifactError, match=f"{tmp_path} is read-only for this user"):
        tune("no such model", "no such file", output=tmp_path / below)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match=r"precious\.txt"):
        tune("no such model", "no such file", output=tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_overwrite_replaces_the_prompt_and_keeps_other_files(llama, rows, tmp_path):
    tune(llama, rows, output=tmp_path, **QUICK)
    (tmp_path / "notes.txt").write_text("keep")
    other = tune(llama, rows, output=tmp_path, overwrite=True, seed=1, **QUICK)
    assert torch.equal(prompt_of(load(tmp_path)), prompt_of(other))
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert len((tmp_path / "training_logs.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"verbalizer": "no placeholder"}, TemplateError, "at least one placeholder"),
        ({"verbalizer": "{{inptu}}"}, TemplateError, r"did you mean 'input'\?"),
        ({"verbalizer": "{{output}}"}, TemplateError, "names the target field"),
        ({"early_stopping_patience": 1}, ConfigError, "needs validation_data"),
        ({"learning_rte": 1}, ConfigError, r"did you mean 'learning_rate'\?"),
        ({"overwrite": True}, UsageError, "overwrite has no meaning without output"),
        ({"resume": True}, UsageError, "resume needs the output directory"),
        ({"resume": True, "overwrite": True}, UsageError, "leave overwrite out"),
        ({"seed": 2**32}, ConfigError, "seed must be at most"),
        ({}, BackboneError, "no such model"),
    ],
)
def test_what_is_wrong_is_found_before_the_model_is_loaded(rows, options, error, message):
    with pytest.raises(error, match=message):
        tune("no such model", rows, **options)


def test_missing_and_unusable_data(llama, rows, held_out, tmp_path):
    with pytest.raises(UsageError, match="train_data is missing"):
        tune(llama)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        tune(llama, tmp_path / "none.jsonl")
    strange = [*held_out, {"input": "it", "output": "yess"}]
    with pytest.raises(DataError, match=r"validation data, record 9: 'yess' .*did you mean 'yes'\?"):
        tune(llama, rows, strange)
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in strange))
    with pytest.raises(DataError, match=r"validation data, held_out\.jsonl, line 10: 'yess' is not"):
        tune(llama, rows, path)


def test_a_row_longer_than_the_context_is_refused_with_the_numbers(llama, rows):
    long = [*rows, {"input": "film " * 70, "output": "yes"}]
    with pytest.raises(ContextOverflowError, match=r"72 \+ 3 virtual tokens exceed the model's 64"):
        tune(llama, long, **QUICK)


def test_a_batch_too_small_for_a_row_is_refused_before_anything_is_written(llama, rows, tmp_path):
    with pytest.raises(ConfigError, match=r"max_tokens_per_batch 2 is less than the .* tokens"):
        tune(llama, rows, output=tmp_path / "out", max_tokens_per_batch=2, **QUICK)
    assert not (tmp_path / "out").exists()


def test_labels_of_the_same_tokens_are_refused_before_training(llama):
    unknown = [{"input": "it was", "output": word} for word in ("zip", "zap") * 3]
    with pytest.raises(DataError, match="'zap' and 'zip' are the same tokens"):
        tune(llama, unknown, **QUICK)


def test_a_place_without_a_prompt_is_refused(llama, rows):
    with pytest.raises(ConfigError, match="output_model_types of llama, a causal model"):
        tune(llama, rows, tuning_config={"output_model_types": ["ENCODER"]})


def test_the_signature_shows_every_option_with_its_default():
    parameters = inspect.signature(tune).parameters
    assert list(parameters)[:3] == ["base_model", "train_data", "validation_data"]
    assert parameters["num_epochs"].default == 20
    assert "lr" in parameters
    assert "options" not in parameters


def test_the_recorded_base_is_found_from_another_directory(bases, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(bases)
    tune("llama", rows, output=tmp_path / "prompt", **QUICK)
    monkeypatch.chdir(tmp_path)
    assert Path(load("prompt").manifest.base_model) == bases / "llama"
    assert os.path.samefile(read_run("prompt/run.toml")["base_model"], bases / "llama")


def test_no_file_of_a_run_names_the_folder_of_its_project(llama, rows, held_out, tmp_path, monkeypatch):
    """Paths inside the project are relative in all files, and found again wherever one stands."""
    project = tmp_path / "project"
    shutil.copytree(llama, project / "base")
    for name, part in (("train", rows), ("validation", held_out)):
        (project / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.chdir(project)
    data = [str(project / "train.jsonl"), project / "validation.jsonl"]
    tuned = tune(project / "base", *data, output=project / "runs" / "a", **QUICK)
    for path in (project / "runs" / "a").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    monkeypatch.chdir("/")
    moved = project.rename(tmp_path / "moved")
    for loaded in (load, AutoPeftModelForCausalLM.from_pretrained):
        with pytest.raises(ArtifactError, match="beside it, not in the working directory"):
            loaded(moved / "runs" / "a")
    again = tune(**read_run(moved / "runs" / "a" / "run.toml"))
    monkeypatch.chdir(moved)
    assert load(moved / "runs" / "a")(held_out[0]["input"]) == tuned(held_out[0]["input"])
    assert AutoPeftModelForCausalLM.from_pretrained(moved / "runs" / "a").config.name_or_path == "./base"
    assert torch.equal(again.prompt().tensors[0], tuned.prompt().tensors[0])


def test_the_curve_is_drawn_where_matplotlib_is(llama, rows, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    tune(llama, rows, output=tmp_path / "a", **QUICK)
    assert (tmp_path / "a" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    tune(llama, rows, output=tmp_path / "a", overwrite=True, **QUICK)
    assert not (tmp_path / "a" / "training_curve.png").exists()  # it would be another run's


def test_a_token_budget_changes_memory_and_not_the_prompt(llama, rows):
    """As many updates, of the same rows: the prompt is the same but for rounding."""
    whole = tune(llama, rows, **QUICK)
    split = tune(llama, rows, max_tokens_per_batch=30, **QUICK)
    assert split.metrics["updates"] == whole.metrics["updates"]
    torch.testing.assert_close(split.prompt().input, whole.prompt().input, atol=1e-4, rtol=1e-4)
