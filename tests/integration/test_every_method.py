"""The table of docs/methods.md: each method from a data file to a served completion, by Python and by CLI."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

import softprompt
from oracles.serving import app_over, running
from oracles.slow import only
from softprompt.backbone import load_base
from softprompt.bundled import complaints
from softprompt.cli.main import run

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = dict(
    (name, (python, command))
    for name, python, command in re.findall(r"^\| ([a-z-]+) \| `(.*)` \| `(--.*)` \|$", PAGE, re.M)
)
CONFIGS = {each.__name__: each for each in (softprompt.PromptTuningConfig, softprompt.PrefixTuningConfig)}
TEXT = "It broke again after one day."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny data files, and a folder of all the table's prompts as Python makes them."""
    root = tmp_path_factory.mktemp("methods")
    for name, count in (("train", 16), ("validation", 8), ("test", 8)):
        lines = complaints(name).read_text(encoding="utf-8").splitlines(keepends=True)
        (root / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tuned(folder):
    base = load_base("demo")
    found = {}
    for name, (python, _) in ROWS.items():
        options = eval(f"dict({python})", CONFIGS)
        found[name] = softprompt.tune(
            base,
            folder / "train.jsonl",
            folder / "validation.jsonl",
            output=folder / "prompts" / name,
            num_epochs=1,
            silence_progress_bars=True,
            **options,
        )
    return found


def test_the_table_has_every_method():
    assert set(ROWS) == {
        "prompt-tuning",
        "low-rank",
        "ulpt",
        "residual",
        "superpos",
        "multitask",
        "p-tuning",
        "prefix",
        "cartridge",
        "cpt",
    }


@pytest.mark.parametrize("name", ROWS)
def test_by_python(folder, tuned, name):
    prompt = tuned[name]
    report = softprompt.evaluate(prompt, folder / "test.jsonl")
    again = softprompt.load(folder / "prompts" / name, prompt.base.model)
    assert softprompt.evaluate(again, folder / "test.jsonl").accuracy == report.accuracy
    limit = {"max_new_tokens": 4}
    answer = prompt.generate(TEXT, **limit)[0].text
    assert again.generate(TEXT, **limit)[0].text == answer
    with softprompt.Serving({name: prompt}) as serving:
        (served,) = serving.generate([TEXT], name, **limit)
    assert served.text == answer


@pytest.mark.parametrize("name", only(["prompt-tuning"], ROWS))
def test_by_command_line(folder, tuned, tmp_path, capsys, name):
    """The same prompt, to the bit, as Python makes it; evaluated and generated from."""
    output = tmp_path / name
    words = [
        "--train-data",
        folder / "train.jsonl",
        "--validation-data",
        folder / "validation.jsonl",
    ]
    words += ["--output", output, "--num-epochs", "1", "--quiet", *shlex.split(ROWS[name][1])]
    assert run(["tune", *map(str, words)]) == 0
    capsys.readouterr()
    files = [load_file(each / "adapter_model.safetensors") for each in (output, folder / "prompts" / name)]
    assert files[0].keys() == files[1].keys()
    assert all((files[0][key] == files[1][key]).all() for key in files[0])
    assert run(["evaluate", str(output), "--data", str(folder / "test.jsonl"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"] == softprompt.evaluate(tuned[name], folder / "test.jsonl").accuracy
    generate = ["generate", str(output), "--text", TEXT, "--max-new-tokens", "4", "--json"]
    assert run(generate) == 0
    answer = json.loads(capsys.readouterr().out)["text"]
    assert answer == tuned[name].generate(TEXT, max_new_tokens=4)[0].text
    with running(app_over(tuned[name].base, tmp_path)) as server, server.client() as client:
        assert completion(client, name) == answer


def test_all_are_served_together(folder, tuned):
    base = next(iter(tuned.values())).base
    with running(app_over(base, folder / "prompts")) as server, server.client() as client:
        for name, prompt in tuned.items():
            assert completion(client, name) == prompt.generate(TEXT, max_new_tokens=4)[0].text, name


def completion(client, name):
    """What a server answers for one of its prompts."""
    body = {"model": name, "prompt": TEXT, "max_tokens": 4, "temperature": 0}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]
