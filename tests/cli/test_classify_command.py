"""``softprompt classify``: the labels of texts, lines, records and fields, as Python gives them."""

import io
import json
import sys

import pytest

from oracles.serving import PAIRS, write_prompt, write_tasks
from softprompt import Serving, load
from softprompt.backbone import load_base
from softprompt.cli.main import run
from softprompt.inference import Ensemble, load_many

TEXTS = ["It broke again.", "Lovely, thank you."]


@pytest.fixture(scope="module")
def base():
    return load_base("demo")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, base):
    monkeypatch.setattr("softprompt.inference.loading.load_base", lambda *_, **__: base)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("prompts")
    for seed, name in enumerate("ab"):
        write_prompt(root / name, base, seed=seed)
    write_prompt(root / "pairs", base, template=PAIRS)
    write_prompt(root / "writer", base, task="generation", labels=None)
    write_prompt(root / "many", base, labels=tuple(f"label {i}" for i in range(12)))
    own = {"template": "{{input}}", "task": "classification", "max_source_length": 128, "max_target_length": 8}
    write_tasks(root / "tasks", base, {n: {**own, "labels": [n, "no"]} for n in ("spam", "ham")})
    return root


@pytest.fixture
def out(capsys):
    def call(*words, code=0):
        assert run(["classify", *map(str, words), "--quiet"]) == code
        found = capsys.readouterr()
        return found.err if code else found.out

    return call


def test_a_text_gets_what_python_gets(out, folder):
    expected = load(folder / "a").classify(TEXTS[0])[0].to_dict()
    assert json.loads(out(folder / "a", "--text", TEXTS[0], "--json")) == expected
    with Serving({"a": load(folder / "a")}) as serving:
        assert serving.classify(TEXTS[0], "a")[0].label == expected["label"]
    best, other = sorted(expected["probabilities"].items(), key=lambda each: -each[1])
    width = len("no complaint")
    shown = "".join(f"{label:<{width}}  {share:.4f}\n" for label, share in (best, other))
    assert out(folder / "a", "--text", TEXTS[0]) == shown


def test_lines_and_records_have_an_answer_each(out, folder, tmp_path, monkeypatch):
    labels = [each.label for each in load(folder / "a").classify(TEXTS)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXTS[0]}\n\n{TEXTS[1]}\n"))
    found = json.loads(out(folder / "a", "--json"))["results"]
    assert [(each["line"], each["label"]) for each in found] == [(1, labels[0]), (3, labels[1])]
    for name, rows in (
        ("plain", [{"text": text} for text in TEXTS]),
        ("full", [{"input": text, "output": "x"} for text in TEXTS]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = json.loads(out(folder / "a", "--data", tmp_path / f"{name}.jsonl", "--json"))["results"]
        assert [(each["record"], each["label"]) for each in found] == [(1, labels[0]), (2, labels[1])]
    lines = out(folder / "a", "--data", tmp_path / "plain.jsonl").splitlines()
    assert [line.partition("\t")[0] for line in lines] == labels


def test_fields_tasks_labels_and_ensembles(out, folder):
    fields = {"first": "tea", "second": "milk"}
    pairs = [word for name, value in fields.items() for word in ("--field", f"{name}={value}")]
    found = json.loads(out(folder / "pairs", *pairs, "--json"))
    assert found == load(folder / "pairs").classify(fields)[0].to_dict()
    found = json.loads(out(folder / "tasks", "--task-name", "ham", "--text", "x", "--json"))
    assert set(found["scores"]) == {"ham", "no"}
    found = json.loads(
        out(folder / "writer", "--text", "x", "--label", "yes", "--label", "no", "--normalize", "--json")
    )
    assert found == load(folder / "writer").classify("x", ["yes", "no"], normalize=True)[0].to_dict()
    pair = [folder / "a", folder / "b"]
    found = json.loads(out(*pair, "--text", TEXTS[0], "--combine", "vote", "--json"))
    assert found == Ensemble(load_many(pair), combine="vote").classify(TEXTS[0])[0].to_dict()


def test_a_long_list_of_labels_is_cut_for_people_alone(out, folder):
    lines = out(folder / "many", "--text", "x").splitlines()
    assert (len(lines), lines[-1]) == (11, "... and 2 more labels; --json shows all")
    assert len(json.loads(out(folder / "many", "--text", "x", "--json"))["scores"]) == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["writer", "--text", "x"], "has no label set; name labels with --label, or use softprompt generate"),
        (["a", "--text", "x", "--combine", "vote"], "--combine would be ignored with one prompt"),
        (["a", "b", "--text", "x", "--label", "y"], "--label is for one prompt"),
        (["a", "--text", "x", "--data", "y"], "--data holds the inputs; leave --text and --field out"),
        (["tasks", "--text", "x"], "this prompt has 2 tasks (spam, ham)"),
        (["a", "--text", "x", "--label", "y", "--label", "y"], "have the same tokens"),
    ],
)
def test_a_mistake_is_one_line(out, folder, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    err = out(*words, code=2)
    assert said in err
    assert err.count("\n") == 1


def test_generate_on_a_classifier_points_here(capsys, folder):
    words = ["--text", "x", "--max-new-tokens", "1"]
    assert run(["generate", str(folder / "a"), *words]) == 0
    err = capsys.readouterr().err
    assert "is a classifier" in err
    assert f"softprompt classify {folder / 'a'} gives labels with probabilities" in err
    assert run(["generate", str(folder / "writer"), *words]) == 0
    assert capsys.readouterr().err == ""
