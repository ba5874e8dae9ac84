"""Benches start and print their results, in their smallest form: one that broke unseen measures nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
SMALLEST = {
    "answer_forms": "--json",
    "cost_model": "--rows 1 --tokens 16 --answer 4 --virtual 2 --json",
    "decode_step": "--rows 2 --context 20 --repeats 1 --json",
    "distill": "--document 32 --rows 2 --layers 1 --virtual 4 --epochs 1 --rounds 1 --peft-rows 1 --json",
    "label_scoring": "--virtual 4 --inputs 1 --rounds 1 --json",
    "multitask": "--seeds 1 --rows 8 --json",
    "serving": "--requests 4 --clients 2 --registered 2 --json",
    "serving_load": "--seconds 5 --clients 2 --prompts 2 --json",
    "side_by_side": "--counts 1,2 --rounds 1 --json",
    "soak": "--requests 50 --cycles 4 --json",
    "step_budget": "--budgets 32 --requests 4 --rounds 1 --json",
    "trainer_step": "--only gpt2-p20 --rounds 1 --json",
    "training_step": "--only gpt2-p20 --rounds 1 --json",
    "transfer": "--seeds 2 --epochs 1 --json",
    "kills": "--kills 1",
}
REAL = ("label_scoring", "multitask", "transfer")
"""Those on real data."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_bench_runs(name, bench, shared):
    if name in REAL:
        shared("data")
    printed = bench(name, *SMALLEST[name].split())
    assert json.loads(printed) if SMALLEST[name].endswith("--json") else printed


def test_kills_sees_what_differs_and_no_times(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import kills

    def written(name, loss, second, virtual=20):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"prompt_embeddings": torch.ones(2)}, folder / "adapter_model.safetensors")
        log = [{"data": {"value": value, "timestamp": second}} for value in (5.0, loss)]
        (folder / "training_logs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
        (folder / "adapter_config.json").write_text(json.dumps({"num_virtual_tokens": virtual}))
        manifest = {"created": second, "metrics": {"seconds": second, "loss": loss}}
        (folder / "softprompt.json").write_text(json.dumps(manifest))
        return folder

    one = written("one", 4.0, 1)
    assert kills.differences(one, written("later", 4.0, 2)) == []
    assert kills.differences(one, written("other", 4.1, 1)) == ["training_logs.jsonl", "softprompt.json"]
    assert kills.differences(one, written("shorter", 4.0, 1, virtual=19)) == ["adapter_config.json"]


def test_every_bench_is_among_them_or_has_a_reason():
    elsewhere = {"gpu", "ranks", "quality", "serving_vllm"}  # tests of their own, and vLLM's environment
    elsewhere |= {"distill_goals", "growth", "real_tasks", "position_shift"}  # hours, or data from elsewhere
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py") if "\nif __name__ ==" in path.read_text("utf-8")}
    assert scripts == SMALLEST.keys() | elsewhere
