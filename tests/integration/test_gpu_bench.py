"""``bench/gpu.py`` runs on a CPU with a tiny model, so that it works the first time it meets a GPU."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_case_runs_and_agrees_with_peft(bench, tmp_path):
    printed = bench("gpu", "--tiny", "--device", "cpu", "--output", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["failed"], found["left out"]) == ({}, [])
    ways = {(each["case"], each["work"], each["way"]): each for each in found["results"]}
    assert {case for case, _, _ in ways} == {"training", "forward", "labels", "decoding", "attention"}
    assert all(each["seconds"] > 0 for each in found["results"])
    for (case, work, way), each in ways.items():
        half = "bfloat16" in work
        if case == "training":
            assert each["loss apart"] < (0.03 if half else 1e-4), way
            assert each["gradient apart"] < (0.1 if half else 1e-4), way
        if case == "forward":  # once a layer
            assert (each["flex calls"], each["loss apart"] < (0.03 if half else 1e-4)) == (4, True)
    assert {way for case, _, way in ways if case == "training"} == {"PEFT", "compiled", "eager", "varlen", "packed"}
    assert len([case for case, _, _ in ways if case == "forward"]) == 2
    alone = {way: each["apart"] for (case, _, way), each in ways.items() if case == "attention"}
    assert alone.keys() == {"varlen, prompt repeated", "varlen, merged", "FlexAttention, forest"}
    assert max(alone.values()) < 0.05
    assert printed.count("| training |") == 10


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_calls_of_varlen_that_are_merged_are_the_attention_of_the_forest(monkeypatch, kv_heads):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu_varlen

    gpu_varlen.on_cpu()
    virtual, lengths = 5, (3, 1, 6)
    total = virtual + sum(lengths)
    torch.manual_seed(0)
    drawn = [torch.randn(1, heads, total, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    tree = torch.repeat_interleave(torch.arange(4), torch.tensor([virtual, *lengths]))
    sees = torch.ones(total, total, dtype=torch.bool).tril() & ((tree == 0) | (tree == tree.unsqueeze(1)))
    expected = F.scaled_dot_product_attention(*drawn, attn_mask=sees, scale=0.3, enable_gqa=True)
    stretches = gpu_varlen.Stretches.of(virtual, lengths, torch.device("cpu"))
    found = gpu_varlen.merged(*drawn, stretches, 0.3)
    above = torch.randn_like(expected)
    grads = [torch.autograd.grad(each, drawn, above) for each in (found, expected)]
    for one, other in ((found, expected), *zip(*grads, strict=True)):
        assert torch.allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="a stream of 15 tokens was laid out; got 14"):
        gpu_varlen.merged(*(each[:, :, 1:] for each in drawn), stretches, 0.3)


def test_torchs_own_autograd_drops_what_a_merge_needs(monkeypatch):
    """Why ``gpu_varlen`` has a backward of its own; where torch changes this, it needs none."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from torch.nn.attention import varlen

    import gpu_varlen

    gpu_varlen.on_cpu()
    query, key, value = (torch.randn(3, 1, 8, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, 3], dtype=torch.int32)
    aux = varlen.AuxRequest(lse=True)
    _, lse = varlen.varlen_attn(query, key, value, ends, ends, 3, 3, return_aux=aux)
    (found,) = torch.autograd.grad(lse.sum(), query)
    assert not found.any()
