"""Every command run in this process on the bundled model and a handful of rows."""

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from oracles.serving import write_prompt
from softprompt import bundled
from softprompt.backbone import load_base
from softprompt.cli import demo, generate, tune
from softprompt.cli.main import main, run
from softprompt.engine import choose
from softprompt.errors import ConfigError
from softprompt.generation import GenerationOptions
from softprompt.training import Events, TuneSettings, TuningConfig

QUICK = ["--num-epochs", "1", "--num-virtual-tokens", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    kinds = [("it broke again", "complaint"), ("lovely, thank you", "no complaint")]
    rows = [{"input": f"{text} {i}", "output": label} for i in range(6) for text, label in kinds]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def prompt_dir(tmp_path_factory, data):
    output = tmp_path_factory.mktemp("prompts") / "prompt"
    assert run(["tune", "--train-data", data, "--output", str(output), "--quiet", *QUICK]) == 0
    return str(output)


@pytest.fixture
def result(capsys):
    """Run a command with --json and return the one object on its stdout."""

    def call(*arguments):
        code = run([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert out.endswith("}\n")
        assert out.count("\n") == 1
        return json.loads(out)

    return call


@pytest.fixture
def failure(capsys):
    """Run a command that fails and return its one line on stderr."""

    def call(*arguments, code=2):
        assert run(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return call


def test_tune_reports_one_object(result, data, tmp_path):
    output = str(tmp_path / "out")
    found = result(
        "tune",
        *("--base-model", "demo", "--train-data", data, "--validation-data", data),
        *("--output", output, *QUICK),
    )
    assert found["output"] == output
    assert found["steps"] == 3
    assert found["final_loss"] > 0
    assert found["tokens_per_second"] > 0
    assert set(found["metrics"]) == {"accuracy", "loss"}
    assert found["labels"] == ["complaint", "no complaint"]
    assert os.path.exists(output + "/adapter_model.safetensors")


def test_tune_for_people(capsys, data, tmp_path):
    output = str(tmp_path / "out")
    assert run(["tune", "--train-data", data, "--output", output, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert "final loss" in out.replace("_", " ")
    assert "learning rate" in err
    assert "epoch 1: loss" in err


def test_quiet_leaves_stderr_empty(capsys, data, tmp_path):
    output = str(tmp_path / "out")
    assert run(["tune", "--train-data", data, "--output", output, "--quiet", *QUICK]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_file_is_overridden_by_options(result, data, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text(
        f"train_data = '{data}'\nnum_epochs = 2\nlr = 0.5\nbatch_size = 12\n"
        "[tuning_config]\nnum_virtual_tokens = 3\n"
        "prompt_tuning_init_method = 'SAMPLE_VOCAB'\n"
    )
    options = ["--config", str(config), "--learning-rate", "0.25", "--num-virtual-tokens", "4"]
    found = result("tune", *options, "--output", str(tmp_path / "out"))
    assert (found["steps"], found["learning_rate"]) == (2, 0.25)
    saved = (tmp_path / "out" / "run.toml").read_text()
    assert "num_virtual_tokens = 4" in saved
    assert 'prompt_tuning_init_method = "SAMPLE_VOCAB"' in saved
    again = result("tune", "--config", str(tmp_path / "out" / "run.toml"), "--output", str(tmp_path / "b"))
    assert again["final_loss"] == found["final_loss"]


def test_a_method_on_the_command_line_goes_before_the_run_files(failure, result, data, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text(f"train_data = '{data}'\nnum_epochs = 1\nmethod = 'prefix'\n")
    output = tmp_path / "out"
    result("tune", "--config", str(config), "--method", "cartridge", "--output", str(output))
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["num_frozen_tokens"]) == ("CARTRIDGE", 1)
    both = ("--method", "cpt", "--tuning-type", "CPT")
    message = failure("tune", "--train-data", data, "--output", str(tmp_path / "b"), *both)
    assert "--method='cpt' and --tuning-type='CPT' are the same setting" in message
    wrong = ("--method", "prefix", "--num-frozen-tokens", "2")
    message = failure("tune", "--train-data", data, "--output", str(tmp_path / "b"), *wrong)
    assert "--num-frozen-tokens would be ignored with --tuning-type PREFIX_TUNING" in message


def test_evaluate_reports_one_object(result, prompt_dir, data):
    tuned = result("evaluate", prompt_dir, "--data", data)
    assert {"rows", "accuracy", "macro_f1", "invalid"} <= set(tuned)
    assert (tuned["rows"], tuned["without_prompt"]) == (12, False)
    base = result("evaluate", prompt_dir, "--data", data, "--without-prompt")
    assert base["without_prompt"] is True
    assert base["perplexity"] != tuned["perplexity"]
    text = result("evaluate", prompt_dir, "--data", data, "--task", "generation", "--limit", "2")
    assert {"exact_match", "rouge_l", "perplexity"} <= set(text)
    assert text["rows"] == 2


@pytest.mark.slow
def test_evaluate_reports_several_prompts_as_an_ensemble(result, failure, capsys, prompt_dir, data, tmp_path):
    pair = [prompt_dir, str(shutil.copytree(prompt_dir, tmp_path / "copy"))]
    alone = result("evaluate", prompt_dir, "--data", data)
    found = result("evaluate", *pair, "--data", data, "--combine", "vote")
    assert (found["combine"], list(found["members"])) == ("vote", pair)
    assert found["members"][pair[1]]["accuracy"] == alone["accuracy"] == found["accuracy"]
    assert result("evaluate", *pair, "--data", data)["combine"] == "mean"
    assert run(["evaluate", *pair, "--data", data, "--quiet"]) == 0
    assert "ensemble of 2 prompts by mean" in capsys.readouterr().out
    wrong = failure("evaluate", prompt_dir, "--data", data, "--combine", "vote")
    assert "name two or more" in wrong
    assert "a name of its own" in failure("evaluate", pair[0], pair[0], "--data", data, "--quiet")


def test_generate_answers_a_text(result, prompt_dir):
    found = result("generate", prompt_dir, "--text", "it broke", "--max-new-tokens", "3")
    assert {"text", "input_token_count", "generated_tokens", "finish_reason"} <= set(found)
    assert found["generated_tokens"] <= 3
    named = result("generate", prompt_dir, "--field", "input=it broke", "--max-new-tokens", "3")
    assert named == found


def test_generate_answers_lines_of_stdin(result, prompt_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("it broke\n\nlovely\n"))
    found = result("generate", prompt_dir, "--max-new-tokens", "3")
    assert [each["line"] for each in found["results"]] == [1, 3]
    alone = result("generate", prompt_dir, "--text", "it broke", "--max-new-tokens", "3")
    assert found["results"][0] == {"line": 1} | alone


def test_generate_answers_the_records_of_a_file(result, failure, prompt_dir, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"text": "it broke"}\n\n{"text": "lovely", "label": "x"}\n')
    data = ("--data", str(tmp_path / "new.jsonl"))
    found = result("generate", prompt_dir, *data, "--max-new-tokens", "3")["results"]
    alone = [
        result("generate", prompt_dir, "--text", each, "--max-new-tokens", "3") for each in ("it broke", "lovely")
    ]
    assert found == [{"record": number} | each for number, each in enumerate(alone, start=1)]
    said = "--data holds the inputs; leave --text and --field out"
    assert said in failure("generate", prompt_dir, *data, "--text", "x")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in failure("generate", prompt_dir, "--data", str(tmp_path / "empty.jsonl"))


def test_blank_lines_of_stdin_are_named(capsys, prompt_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nit broke\n \n"))
    assert run(["generate", prompt_dir, "--max-new-tokens", "1", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["results"]) == 1
    assert err == "warning: 2 blank lines of stdin have no answer: 1, 3\n"


def test_stdin_that_is_not_text_is_a_mistake(failure, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert "stdin is not UTF-8" in failure("generate", "nowhere")


def test_info_reports_what_it_is(result, capsys, prompt_dir):
    found = result("info", prompt_dir)
    assert (found["base_model"], found["virtual_tokens"]) == ("demo", 2)
    assert len(found["nearest"]) == 2
    assert found["settings"]["num_epochs"] == 1
    assert found["data"]["train"]["rows"] == 12
    assert found["engine"] == {"name": "forest", "reason": ""}
    without = result("info", prompt_dir, "--without-base")
    assert (without["nearest"], without["engine"]) == (None, None)
    assert run(["info", prompt_dir, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "nearest tokens" in out
    assert "num epochs" in out


def test_info_without_its_base_says_so(capsys, prompt_dir, tmp_path):
    for path in Path(prompt_dir).iterdir():
        moved = path.read_bytes().replace(b'"base_model": "demo"', b'"base_model": "gone"')
        (tmp_path / path.name).write_bytes(moved)
    assert run(["info", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "warning: shown without its base" in err
    assert "gone" in out


@pytest.mark.parametrize("known", [True, False])
def test_info_of_what_writes_no_text_or_names_no_base(result, tmp_path, known):
    folder = write_prompt(tmp_path / "prompt", load_base("demo"), manifest=False)
    config = folder / "adapter_config.json"
    own = {"task_type": "SEQ_CLS"} if known else {"base_model_name_or_path": None}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    found = result("info", str(folder))
    assert (found["virtual_tokens"], found["engine"], found["base_model"]) == (4, None, "demo" if known else None)
    assert (found["nearest"] is None) is not known


def test_info_says_why_no_faster_engine_runs(capsys, prompt_dir, monkeypatch):
    monkeypatch.setattr("oracles.probed._found", {})
    monkeypatch.setattr(choose, "scoring_difference", lambda *engines, **options: "it differs")
    assert run(["info", prompt_dir, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "engine          plain (forest: it differs; expand: it differs)" in out


def test_answers_of_a_form(result, failure, prompt_dir, tmp_path):
    words = ["generate", prompt_dir, "--text", "it broke", "--max-new-tokens", "40"]
    assert result(*words, "--choices", "red", "--choices", "green")["text"] in ("red", "green")
    assert re.fullmatch("[0-9]{3}", result(*words, "--regex", "[0-9]{3}")["text"])
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["a", 3]}, "maxItems": 2}')
    assert set(json.loads(result(*words, "--json-schema", str(schema))["text"])) <= {"a", 3}
    assert "one form, got choices and regex" in failure(*words, "--choices", "a", "--regex", "b")
    assert "unclosed group" in failure(*words, "--quiet", "--regex", "(b")
    schema.write_text("{")
    assert "--json-schema is not JSON" in failure(*words, "--json-schema", str(schema))
    assert "No such file" in failure(*words, "--json-schema", str(tmp_path / "none.json"))


@pytest.fixture
def other_base(tmp_path):
    """The bundled model with other weights."""
    base = load_base("demo")
    for weight in base.model.parameters():
        weight.data.mul_(2)
    base.model.save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_a_base_the_prompt_was_not_made_for(result, failure, prompt_dir, data, other_base):
    for command in (
        ["evaluate", prompt_dir, "--data", data, "--limit", "1"],
        ["generate", prompt_dir, "--text", "x", "--max-new-tokens", "1"],
        ["info", prompt_dir],
    ):
        told = failure(*command, "--base-model", other_base)
        assert f"was made for demo, this base is {other_base}, another model" in told
        assert told.rstrip().endswith("load its own base, or pass --ignore-fingerprint")
        result(*command, "--base-model", other_base, "--ignore-fingerprint")


def test_demo_does_the_whole_job(result, data, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(bundled, "complaints", lambda split: data)
    monkeypatch.setitem(demo.SETTINGS, "num_epochs", 1)
    output = str(tmp_path / "demo")
    found = result("demo", "--output", output)
    assert set(found["test"]) == {"base", "tuned"}
    assert os.path.exists(found["curve"])
    assert "--overwrite" in failure("demo", "--output", output)
    assert result("demo", "--output", output, "--overwrite")["test"] == found["test"]


def test_demo_prints_a_table_also_without_matplotlib(capsys, data, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ConfigError("figures need matplotlib")

    monkeypatch.setattr(bundled, "complaints", lambda split: data)
    monkeypatch.setitem(demo.SETTINGS, "num_epochs", 1)
    monkeypatch.setattr("softprompt.display.training_curve", missing)
    assert run(["demo", "--output", str(tmp_path / "demo"), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "warning: no training curve: figures need matplotlib" in err.splitlines()
    assert out.splitlines()[0].split()[-2:] == ["base", "tuned"]
    assert any(line.startswith("accuracy") for line in out.splitlines())
    assert f"try     softprompt classify {tmp_path / 'demo'} --text" in out


def test_ctrl_c_saves_prints_how_to_go_on_and_that_works(capsys, data, tmp_path, monkeypatch):
    told = Events.update

    def tell(self, state, loss):
        told(self, state, loss)
        if state.update == 2:
            os.kill(os.getpid(), signal.SIGINT)

    output = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Events, "update", tell)
        assert run(["tune", "--train-data", data, "--output", output, *QUICK]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    command = last.partition("continue it with: ")[2] or last.partition("continue with: ")[2]
    assert command.startswith("softprompt tune --resume")
    assert run([*command.split()[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tnue"], "no command 'tnue' (did you mean 'tune'?)"),
        (["tune", "--lerning-rate", "1"], "--learning-rate"),
        (["tune", "--num-epochs", "many"], "'many' is not a valid integer"),
        (["tune", "--train-data", "x"], "tune needs --output DIR"),
        (["tune", "--output", "o"], "--train-data is missing"),
        (["tune", "--output", "o", "--num-epochs", "0"], "--num-epochs must be at least 1"),
        (["tune", "--output", "o", "--train-data", "no.jsonl"], "no.jsonl"),
        (["tune", "--output", "o", "--resume"], "holds no interrupted run"),
        (["tune", "--output", "o", "--config", "no.toml"], "there is no file no.toml"),
        (
            ["tune", "--output", "o", "--config", "three.toml"],
            "'train_data' takes a text, or a table",
        ),
        (["tune", "--output", "o", "--train-data", "empty.jsonl"], "the file is empty"),
        (["tune", "--output", "o", "--train-data", "bad.jsonl"], "bad.jsonl, line 2: not valid"),
        (["tune", "--output", "o", "--train-data", "lacks.jsonl"], "line 1: expected the fields"),
        (["tune", "--output", "o", "--train-data", "data", "--verbalizer", "x"], "placeholder"),
        (
            ["tune", "--output", "o", "--train-data", "data", "--base-model", "nowhere"],
            "'nowhere' is neither",
        ),
        (
            [
                "tune",
                "--output",
                "o",
                "--train-data",
                "data",
                "--num-virtual-tokens",
                "600",
                "--quiet",
            ],
            "+ 600 virtual tokens exceed the model's",
        ),
        (["tune", "--output", "full", "--train-data", "data"], "full holds 1 entries (kept)"),
        (["tune", "--output", "full/kept/o", "--train-data", "data", "--quiet"], "Not a directory"),
        (["evaluate", "nowhere", "--data", "x"], "nowhere does not exist"),
        (["evaluate", "nowhere"], "Missing option '--data'"),
        (["generate", "nowhere", "--text", "x"], "nowhere does not exist"),
        (["generate", "nowhere", "--text", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "nowhere", "--field", "x"], "--field takes NAME=TEXT; got 'x'"),
        (
            ["generate", "nowhere", "--text", "hi", "--field", "input=q"],
            "'input' is given twice by --field, or by --text and --field",
        ),
        (["generate", "nowhere", "--field", "a=1", "--field", "a=2"], "'a' is given twice"),
        (["info", "nowhere"], "nowhere does not exist"),
        (["sweep", "--train-data", "data"], "sweep needs --output DIR, for its state and for the best prompt"),
    ],
)
def test_every_mistake_is_one_line_and_code_2(failure, monkeypatch, tmp_path, data, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.toml").write_text("train_data = 3\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"input": "a", "output": "b"}\n{oops\n')
    (tmp_path / "lacks.jsonl").write_text('{"message": "a"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert words in failure(*[data if word == "data" else word for word in arguments])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_damaged_weights_are_one_line_and_code_2(failure, prompt_dir, tmp_path, damage):
    shutil.copytree(prompt_dir, tmp_path / "copy")
    weights = tmp_path / "copy" / "adapter_model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    assert str(weights) in failure("generate", str(tmp_path / "copy"), "--text", "x")


def test_without_a_command_the_help_is_shown(capsys):
    assert run([]) == 0
    assert capsys.readouterr().out.startswith("Usage: softprompt")


def test_no_input_at_all_is_a_mistake(failure, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "stdin is empty" in failure("generate", "nowhere")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert "nothing to answer: give --text, --data, or lines on stdin" in failure("generate", "nowhere")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "Error: [Errno 28] No space left on device\n"),
    ],
)
def test_what_ends_a_command_from_outside_is_one_line(capsys, monkeypatch, error, code, said):
    def ended(**_):
        raise error

    monkeypatch.setattr(generate.command, "callback", ended)
    with pytest.raises(SystemExit) as raised:
        main(["generate", "nowhere"])
    assert raised.value.code == code
    assert capsys.readouterr().err.lstrip() == said  # a terminal shows ^C before it


def test_every_setting_has_an_option():
    for command, owners in (
        (tune.command, (TuneSettings, TuningConfig)),
        (generate.command, (GenerationOptions,)),
    ):
        options = {option for parameter in command.params for option in parameter.opts}
        for owner in owners:
            for item in fields(owner):
                flag = "--" + item.name.replace("_", "-")
                assert flag in options or item.name == "tuning_config"
    assert "--lr" in {option for parameter in tune.command.params for option in parameter.opts}
