"""The real lm-evaluation-harness over the server, where it is installed (``pip install "lm-eval[api]"``)."""

import json

import pytest

from softprompt import load
from softprompt.bundled import complaints
from softprompt.engine import EngineRow, PlainEngine

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is too heavy for the dev extra")
CHOICES = ["complaint", "no complaint"]
COUNT = 12


@pytest.fixture(scope="module")
def examples():
    lines = complaints("test").read_text().splitlines()[:COUNT]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def task(tmp_path_factory, examples):
    """An offline task: the first bundled test messages, scored by the likelier of two words."""
    path = tmp_path_factory.mktemp("task") / "test.jsonl"
    path.write_text("\n".join(map(json.dumps, examples)))
    return {
        "task": "complaints_offline",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Text : {{input}} Label :",
        "doc_to_choice": CHOICES,
        "doc_to_target": "{{['complaint', 'no complaint'].index(output)}}",
        "metric_list": [{"metric": "acc"}],
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["demo", "writer"])
def test_multiple_choice(server, base, shared_prompts, tmp_path, monkeypatch, task, examples, name):
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from softprompt.lm_eval import HarnessModel

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    base.tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = LocalCompletionsAPI(
        model=name,
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(tmp_path / "tokenizer"),
        tokenized_requests=True,
        num_concurrent=4,
    )
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)

    tuned = load(shared_prompts / "writer", base.model, tokenizer=base.tokenizer)
    prompt = tuned.prompt() if name == "writer" else None
    encode = base.tokenizer.encode
    right = 0
    for sample, example in zip(found["samples"]["complaints_offline"], examples, strict=True):
        context = encode(f"Text : {example['input']} Label :")
        rows = []
        for choice in CHOICES:
            whole = encode(f"Text : {example['input']} Label : {choice}")
            own = (tuple(whole[: len(context)]), tuple(whole[len(context) :]))
            rows.append(EngineRow(*own, prompt))
        sums = PlainEngine(base).target_log_probs(rows).row_sums(2).tolist()
        assert [float(each[0][0]) for each in sample["resps"]] == pytest.approx(sums, abs=1e-4)
        right += CHOICES[sums.index(max(sums))] == example["output"]
    assert found["results"]["complaints_offline"]["acc,none"] == pytest.approx(right / COUNT)

    own = HarnessModel("demo", None if name == "demo" else str(shared_prompts / name), ignore_fingerprint=True)
    without_server = simple_evaluate(model=own, tasks=[task], task_manager=manager, bootstrap_iters=0)
    for one, other in zip(
        *(each["samples"]["complaints_offline"] for each in (found, without_server)), strict=True
    ):
        for (served,), (direct,) in zip(one["resps"], other["resps"], strict=True):
            assert float(served[0]) == pytest.approx(float(direct[0]), abs=1e-4)
            assert served[1] == direct[1]
