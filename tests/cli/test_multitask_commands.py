"""Source training, sources and adaptation on the command line."""

import json

import pytest

from softprompt.cli.main import run
from softprompt.cli.options import named
from softprompt.cli.tune import data_sets
from softprompt.errors import UsageError

QUICK = ["--num-epochs", "1", "--num-virtual-tokens", "2", "--batch-size", "6"]
MULTITASK = ["--tuning-type", "MULTITASK_PROMPT_TUNING", *QUICK]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, labels in (("moods", ("good", "bad")), ("kinds", ("yes", "no"))):
        rows = [{"input": f"it {label} {i}", "output": label} for i in range(4) for label in labels]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("sources")
    data = [f"{name}={files / name}.jsonl" for name in ("moods", "kinds")]
    words = ["--train-data", data[0], "--train-data", data[1]]
    output = ["--output", str(folder / "both"), "--quiet"]
    own = ["--task-verbalizers", "kinds={{input}} ?", "--distillation-weight", "0"]
    assert run(["tune", *MULTITASK, *words, *own, *output]) == 0
    return folder


@pytest.fixture
def result(capsys):
    """Run a command with --json and return its object."""

    def call(*arguments):
        assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


def test_the_kind_of_several_tasks_is_the_artifacts(result, files, tmp_path):
    rows = [{"input": f"say {i}", "output": f"the word is number {i}"} for i in range(30)]
    (tmp_path / "free.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        "--train-data",
        f"a={files / 'moods'}.jsonl",
        "--train-data",
        f"b={tmp_path}/free.jsonl",
    ]
    output = tmp_path / "mixed"
    words = ["--distillation-weight", "0", "--output", output, "--quiet"]
    found = result("tune", *MULTITASK, *data, *words)
    written = json.loads((output / "softprompt.json").read_text())
    assert found["task"] == written["task"] == "generation"


def test_a_column_names_the_task_of_each_row(result, sources, files, tmp_path):
    rows = [
        json.loads(line) | {"kind": name}
        for name in ("moods", "kinds")
        for line in (files / f"{name}.jsonl").read_text().splitlines()[:3]
    ]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = result("evaluate", sources / "both", "--data", tmp_path / "both.jsonl", "--task-field", "kind")
    assert {name: part["rows"] for name, part in found["tasks"].items()} == {"moods": 3, "kinds": 3}


def test_one_setting_under_two_names_is_given_once(capsys, tmp_path, files):
    both = ["--lr", "0.1", "--learning-rate", "0.2", "--output", str(tmp_path / "out")]
    assert run(["tune", "--train-data", str(files / "moods.jsonl"), *both]) == 2
    assert "--learning-rate and --lr are the same setting; give it once" in capsys.readouterr().err


def test_sources_are_listed_with_what_fits(result, capsys, sources, monkeypatch):
    monkeypatch.setenv("SOURCE_PROMPT_BASE", str(sources))
    (found,) = result("sources", "list", "--base-model", "demo")["sources"]
    assert (found["name"], found["tasks"], found["fits"]) == ("both", ["moods", "kinds"], True)
    assert (found["virtual_tokens"], found["ranks"], found["misfit"]) == (2, 1, None)
    assert len(found["fingerprint"]) == 12
    assert "fits" not in result("sources", "list")["sources"][0]
    assert run(["sources", "list", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("both  tasks: moods, kinds  2 x ")
    assert "training loss" in out


def test_a_source_is_used_by_one_task_or_adapted(result, sources, files, tmp_path):
    prompt = sources / "both"
    data = files / "kinds.jsonl"
    report = result("evaluate", prompt, "--data", data, "--task-name", "kinds")
    assert report["rows"] == 8
    answer = result("generate", prompt, "--text", "it", "--task-name", "1", "--max-new-tokens", 2)
    assert answer["generated_tokens"] <= 2
    found = result(
        *("tune", *MULTITASK, "--train-data", data, "--output", tmp_path / "out"),
        *("--source-prompt-base", sources, "--prompt-tuning-init-source-model", "both"),
        *("--prompt-tuning-init-method", "AVERAGE_SOURCE", "--task-learning-rate", "0.2"),
    )
    assert (found["steps"], found["tasks"], found["labels"]) == (2, None, ["no", "yes"])


def test_cut_rows_are_reported(result, files, tmp_path):
    long = tmp_path / "long.jsonl"
    rows = (files / "moods.jsonl").read_text().replace("it ", "it was a long story that ")
    long.write_text(rows)
    words = ["--train-data", long, "--max-source-length", "4", *QUICK]
    assert result("tune", *words, "--output", tmp_path / "out")["cut"] == {
        "sources": 8,
        "targets": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sources", "list"], "no folder to look in; give --source-prompt-base"),
        (["sources", "list", "--source-prompt-base", "none"], "must be a folder of source prompts"),
        (["tune", "--output", "o", "--train-data", "a", "--train-data", "b"], "takes TASK=FILE"),
        (["tune", "--output", "o", "--train-data", "a=x.jsonl"], "need --tuning-type MULTITASK"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOURCE_PROMPT_BASE", raising=False)
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.jsonl").write_text("")
    assert data_sets(["a=b.jsonl"], "--train-data") == "a=b.jsonl"
    assert data_sets(["a=c.jsonl"], "--train-data") == {"a": "c.jsonl"}
    assert data_sets(["a=b=c", "d=e"], "--train-data") == {"a": "b=c", "d": "e"}
    with pytest.raises(UsageError, match="names 'a' twice"):
        named(["a=1", "a=2"], "--train-data", "TASK=FILE")


def test_an_ensemble_of_one_task(result, sources, files, capsys):
    words = ["evaluate", sources / "both", f"{sources}/./both", "--data", files / "kinds.jsonl"]
    report = result(*words, "--task-name", "kinds")
    alone = result("evaluate", sources / "both", *words[3:], "--task-name", "kinds")
    assert (report["accuracy"], report["rows"]) == (alone["accuracy"], 8)
    for member in report["members"].values():
        assert member["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert run([*map(str, words), "--quiet"]) == 2
    assert "--task-name" in capsys.readouterr().err
