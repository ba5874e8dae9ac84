"""``evaluate`` with baselines, ``compare`` and ``runs``, on the bundled model and a handful of records."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from softprompt import Baseline, compare, evaluate, load
from softprompt.cli.main import run
from softprompt.training import Events, list_runs

TEMPLATE = "Message: {{input}}\nLabel:"
KINDS = [("it broke again", "complaint"), ("lovely, thank you", "no complaint")]
QUICK = ["--num-epochs", "1", "--batch-size", "4", "--verbalizer", TEMPLATE, "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, an instruction, and runs: two finished, one interrupted, two broken."""
    place = tmp_path_factory.mktemp("place")
    for name, first in (("train", 0), ("test", 8)):
        rows = [{"input": f"{text} {first + i}", "output": label} for i in range(6) for text, label in KINDS]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "instruction.txt").write_text("Complaint or not?\n")
    tune = ["tune", "--train-data", str(place / "train.jsonl"), *QUICK]
    for name, tokens in (("a", "2"), ("b", "3")):
        assert run([*tune, "--num-virtual-tokens", tokens, "--output", str(place / "runs" / name)]) == 0
    told = Events.update

    def tell(self, state, loss):
        told(self, state, loss)
        if state.update == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Events, "update", tell)
        assert run([*tune, "--num-virtual-tokens", "2", "--output", str(place / "runs" / "group" / "c")]) == 130
    (place / "runs" / "d").mkdir()
    (place / "runs" / "d" / "adapter_config.json").write_text("{")
    (place / "runs" / "e" / ".state").mkdir(parents=True)
    return place


@pytest.fixture
def result(place, capsys, monkeypatch):
    """Run a command with --json in the place and return its object."""
    monkeypatch.chdir(place)

    def call(*arguments, text=False):
        code = run([*arguments, *([] if text else ["--json"])])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out if text else json.loads(out)

    return call


@pytest.fixture
def failure(place, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def call(*arguments):
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        return err

    return call


@pytest.mark.slow
def test_evaluate_shows_a_prompt_beside_its_baselines(result, tmp_path):
    path = tmp_path / "out.jsonl"
    found = result(
        *("evaluate", "runs/a", "--data", "test.jsonl", "--predictions", str(path)),
        *("--baselines", "zero-shot, instruction,few-shot", "--instruction", "instruction.txt", "--few-shot", "2"),
    )
    assert list(found["baselines"]) == ["zero-shot", "instruction", "2-shot"]
    prompt = load("runs/a")
    few = Baseline(few_shot=2, examples="train.jsonl")  # which the run's file names
    own = evaluate(prompt, "test.jsonl", baselines=[Baseline(instruction="Complaint or not?"), few])
    assert found["accuracy"] == own.accuracy
    for name, each in own.baselines.items():
        assert found["baselines"][name] == each.to_dict()
    implied = result("evaluate", "runs/a", "--data", "test.jsonl", "--instruction", "instruction.txt")
    assert implied["baselines"] == {"instruction": found["baselines"]["instruction"]}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines[::12]] == ["tuned prompt", "zero-shot", "instruction", "2-shot"]


def test_evaluate_of_a_base_alone(result):
    words = ("evaluate", "--base-model", "demo", "--data", "test.jsonl", "--template", TEMPLATE)
    zero = result(*words)
    assert (zero["baseline"], zero["task"], zero["rows"]) == ("zero-shot", "classification", 12)
    both = result(*words, "--instruction", "instruction.txt", "--few-shot", "2", "--examples", "train.jsonl")
    assert both["baseline"] == "instruction + 2-shot"
    several = result(
        *words, "--baselines", "few-shot,zero-shot", "--examples", "train.jsonl", "--example-seed", "3"
    )
    assert (several["baseline"], list(several["baselines"])) == ("4-shot", ["zero-shot"])
    assert several["baselines"]["zero-shot"] == zero
    labels = result(*words, "--label", "complaint", "--label", "no complaint", "--label", "neither")
    assert set(labels["predictions"]) == {"complaint", "no complaint", "neither"}


def test_compare_of_folders_and_baselines(result, tmp_path):
    path = tmp_path / "out.jsonl"
    words = ("compare", "runs/b", "zero-shot", "runs/a", "--data", "test.jsonl")
    found = result(*words, "--predictions", str(path))
    own = compare({"runs/b": load("runs/b"), "zero-shot": Baseline(), "runs/a": load("runs/a")}, "test.jsonl")
    expected = own.to_dict()
    for part in (found, expected):
        for report in part["reports"].values():
            assert report.pop("seconds_per_record") > 0
    assert found == json.loads(json.dumps(expected))
    assert "against runs/b" in str(own)
    assert list(found["reports"]) == ["runs/b", "zero-shot", "runs/a"]
    assert len(path.read_text().splitlines()) == 36


def test_compare_of_baselines_alone_loads_their_base_once(result, monkeypatch):
    from softprompt.evaluation import baselines

    load_base, loaded = baselines.load_base, []

    def counted(*given, **more):
        loaded.append(load_base(*given, **more))
        return loaded[-1]

    monkeypatch.setattr(baselines, "load_base", counted)
    words = ("compare", "zero-shot", "few-shot", "--base-model", "demo", "--template", TEMPLATE)
    found = result(*words, "--data", "test.jsonl", "--examples", "train.jsonl", "--limit", "3")
    assert list(found["reports"]) == ["zero-shot", "few-shot"]
    assert len(loaded) == 1
    assert set(found["reports"]["zero-shot"]["predictions"]) == {"complaint", "no complaint"}


def test_compare_of_prompts_on_different_bases(result, place):
    other = place / "base"
    if not other.exists():
        from softprompt.bundled import model_directory

        shutil.copytree(model_directory(), other)
    config = shutil.copytree(place / "runs/a", place / "elsewhere", dirs_exist_ok=True) / "softprompt.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"base_model": str(other)}))
    adapter = config.with_name("adapter_config.json")
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": str(other)}))
    found = result("compare", "runs/a", "elsewhere", "--data", "test.jsonl")
    assert found["against_first"]["elsewhere"]["difference"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate"], "without a prompt's folder name a base, --base-model"),
        (["evaluate", "--base-model", "demo", "--ignore-fingerprint"], "no --ignore-fingerprint"),
        (
            ["compare", "runs/a", "zero-shot", "--few-shot", "2"],
            "--few-shot would be ignored: name the baseline few-shot too",
        ),
        (["evaluate", "runs/a", "--chat"], "--chat would be ignored"),
        (
            ["evaluate", "runs/a", "--label", "x", "--baselines", "zero-shot"],
            "--label would be ignored: evaluate a base",
        ),
        (["evaluate", "runs/a", "--baselines", "zero"], "no baseline 'zero' (did you mean 'zero-shot'?)"),
        (["evaluate", "runs/a", "--baselines", "instruction"], "needs --instruction"),
        (
            ["evaluate", "runs/a", "--baselines", "instruction", "--instruction", "latin.txt"],
            "latin.txt is not UTF-8 (unexpected end of data); convert it first",
        ),
        (["evaluate", "--base-model", "demo", "--few-shot", "2"], "few-shot needs --examples"),
        (["evaluate", "--base-model", "demo", "--combine", "mean"], "--combine would be ignored"),
        (["evaluate", "runs/a", "--predictions", "test.jsonl"], "test.jsonl exists"),
        (["compare", "runs/a"], "two prompts or more"),
        (["compare", "runs/a", "runs/nothing"], "runs/nothing"),
    ],
)
def test_mistakes_are_one_line(failure, words, message, place):
    (place / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert message in failure(*words, "--data", "test.jsonl", "--quiet")


def test_runs_lists_all_there_is(result, place):
    found = result("runs")
    assert {each["folder"]: each["state"] for each in found["runs"]} == {
        "a": "finished",
        "b": "finished",
        "d": "broken",
        "e": "broken",
        "group/c": "interrupted",
    }
    assert found["differing"] == ["num_virtual_tokens"]
    by_folder = {each["folder"]: each for each in found["runs"]}
    assert by_folder["a"]["settings"]["num_virtual_tokens"] == 2
    assert by_folder["a"]["metrics"]["loss"] > 0
    weights = by_folder["b"]["bytes"]
    assert weights < (place / "runs/b/adapter_model.safetensors").stat().st_size < weights + 2000
    assert by_folder["group/c"]["resume"] == "softprompt tune --resume --output runs/group/c"
    assert by_folder["group/c"]["reason"] == "training was stopped after update 2 (epoch 1)"
    assert "expected JSON in runs/d/adapter_config.json" in by_folder["d"]["reason"]
    assert "before its first state" in by_folder["e"]["reason"]


def test_runs_for_people(result, failure, tmp_path):
    lines = result("runs", text=True).splitlines()
    assert {"run", "state", "num", "virtual", "tokens", "loss", "bytes"} <= set(lines[0].split())
    assert not {"part", "learnt"} & set(lines[0].split())
    assert [line.split()[0] for line in lines[1:6]] == ["a", "b", "d", "e", "group/c"]
    assert any(line.endswith("resume with: softprompt tune --resume --output runs/group/c") for line in lines)
    assert result("runs", str(tmp_path), text=True) == f"no run in {tmp_path}\n"
    assert "is not a folder" in failure("runs", "nowhere")


def test_a_damaged_state_or_run_file_is_a_reason_and_no_failure(place, tmp_path):
    copy = Path(shutil.copytree(place / "runs/group/c", tmp_path / "c"))
    (copy / ".state/run.toml").write_text("nonsense = 1\n")
    (found,) = list_runs(tmp_path)
    assert found.state == "broken" and "unknown key 'nonsense'" in found.reason
    copy = Path(shutil.copytree(place / "runs/group/c", tmp_path / "c", dirs_exist_ok=True))
    (copy / ".state/state.safetensors").write_bytes(b"damaged")
    (found,) = list_runs(tmp_path)
    assert found.state == "broken" and "its state is damaged" in found.reason


def test_info_says_how_an_interrupted_run_goes_on(result, capsys, place, tmp_path):
    found = result("info", "runs/group/c")
    assert found["interrupted"].endswith("continue with: softprompt tune --resume --output runs/group/c")
    assert found["interrupted"] in result("info", "runs/group/c", text=True)
    both = shutil.copytree(place / "runs/a", tmp_path / "both")
    shutil.copytree(place / "runs/group/c/.state", Path(both) / ".state")
    assert run(["info", str(both), "--json", "--without-base"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["virtual_tokens"] == 2
    assert "warning: the prompt is of an earlier run" in err
    assert [each.state for each in list_runs(tmp_path)] == ["interrupted", "finished"]
