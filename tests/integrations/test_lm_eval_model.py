"""``softprompt`` as a model of lm-evaluation-harness: the numbers of plain transformers, and its own command."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner

from softprompt import load, tune
from softprompt.bundled import complaints

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is too heavy for the dev extra")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TASK = {
    "task": "complaints_offline",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Message: {{input}}\nLabel:",
    "doc_to_choice": ["complaint", "no complaint"],
    "doc_to_target": "{{['complaint', 'no complaint'].index(output)}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    out = tmp_path_factory.mktemp("prompt") / "complaints"
    options = {"verbalizer": "Message: {{input}}\nLabel:", "num_epochs": 2, "batch_size": 16, "limit": 96}
    tune("demo", complaints("train"), output=out, silence_progress_bars=True, **options)
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task in YAML, whose records are the first bundled test messages."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "test.jsonl"
    data.write_text("\n".join(complaints("test").read_text().splitlines()[:24]))
    (folder / "task.yaml").write_text(
        yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}})
    )
    return folder


def instances(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, each, number) for number, each in enumerate(arguments)]


PAIRS = [
    ("Message: The kettle broke.\nLabel:", " complaint"),
    ("Message: The kettle broke.\nLabel:", " no complaint"),
    ("Message: What time do you open on Sunday?\nLabel:", " no complaint"),
    ("", "The kettle broke after one day."),
]


@pytest.mark.parametrize("with_prompt", [True, False])
def test_log_likelihoods_are_those_of_plain_transformers(prompt, with_prompt):
    from softprompt.lm_eval import HarnessModel

    model = HarnessModel(prompt=str(prompt)) if with_prompt else HarnessModel(base="demo")
    tuned = load(prompt)
    plain, tokenizer = tuned.base.model, tuned.base.tokenizer
    front = tuned.prompt().input if with_prompt else torch.zeros(0, plain.config.hidden_size)
    for (value, greedy), (context, target) in zip(model.loglikelihood(instances(*PAIRS)), PAIRS, strict=True):
        before = model.tok_encode(context) if context else [model.prefix_token_id]
        whole = tokenizer.encode(context + target) if context else before + tokenizer.encode(target)
        rest = whole[len(before) :]
        embedded = torch.cat([front, plain.get_input_embeddings()(torch.tensor(whole))])[None]
        with torch.no_grad():
            scores = plain(inputs_embeds=embedded).logits[0].log_softmax(-1)[-len(rest) - 1 : -1]
        expected = scores.gather(1, torch.tensor(rest)[:, None]).sum().item()
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == (scores.argmax(-1).tolist() == rest)


def test_a_long_text_is_scored_in_windows_as_the_harness_does_with_transformers(prompt):
    from lm_eval.models.huggingface import HFLM

    from softprompt.lm_eval import HarnessModel

    ours = HarnessModel(base="demo", batch_size=2)
    theirs = HFLM(pretrained=ours._base.model, tokenizer=ours.tokenizer, max_length=ours.max_length - 1)
    texts = [("The kettle broke after one day.",), ("What time do you open? " * 120,)]
    assert len(ours.tok_encode(texts[1][0])) > ours.max_length
    expected = theirs.loglikelihood_rolling(instances(*texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(instances(*texts)) == pytest.approx(expected, rel=1e-5)
    assert HarnessModel(prompt=str(prompt)).max_length == ours.max_length - 20


def test_answers_are_those_of_the_prompt(prompt):
    from softprompt.generation import GenerationOptions
    from softprompt.lm_eval import HarnessModel

    model, tuned = HarnessModel(prompt=str(prompt)), load(prompt)
    texts = [f"Message: {word} broke.\nLabel:" for word in ("The kettle", "My new phone", "Nothing")]
    given = {"until": ["\n"], "max_gen_toks": 6, "temperature": 0.0, "do_sample": False}
    answers = model.generate_until(instances(*((text, given) for text in texts)))
    rows = [tuple(model.tok_encode(text)) for text in texts]
    options = GenerationOptions(max_new_tokens=6, stop_sequences=("\n",))
    # A prompt's own answers lose the space that their template ends without.
    own = [each.text for each in tuned.generate_rows(rows, options)]
    assert [each.strip() for each in answers] == own
    assert all(own)


def test_the_harness_command_runs_it_by_its_name(prompt, tasks, tmp_path):
    words = ["--model", "softprompt", "--model_args", f"base=demo,prompt={prompt}", "--tasks", TASK["task"]]
    words += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-m", "softprompt.lm_eval", *words]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    (found,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(found.read_text())["results"][TASK["task"]]["acc,none"]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    tuned = load(prompt)
    right = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        own = tuned.classify(sample["doc"]["input"])[0]
        likelihoods = [float(each[0][0]) for each in sample["resps"]]
        right += TASK["doc_to_choice"][likelihoods.index(max(likelihoods))] == sample["doc"]["output"]
        assert own.label in TASK["doc_to_choice"]
    assert accuracy == pytest.approx(right / 24)


def test_base_and_prompt_stand_side_by_side(prompt, tasks, tmp_path, monkeypatch):
    from softprompt.lm_eval import _command

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [str(prompt), "--tasks", TASK["task"], "--include-path", str(tasks), "--limit", "24"]
    ran = CliRunner().invoke(_command, words, catch_exceptions=False)
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["task", "metric", "base", str(prompt)]
    task, metric, *values = lines[1].split()
    assert (task, metric) == (TASK["task"], "acc")
    base, tuned = float(values[0]), float(values[3])
    assert tuned > base


def test_a_wrong_argument_is_one_line(tasks):
    words = [
        "--model",
        "softprompt",
        "--model_args",
        "bse=demo",
        "--tasks",
        TASK["task"],
        "--include_path",
        str(tasks),
    ]
    command = [sys.executable, "-W", "ignore", "-m", "softprompt.lm_eval", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: model_args has no bse; give base, prompt, dtype or max_gen_toks"
