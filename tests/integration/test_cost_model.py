"""bench/cost_model.py: its operations, parameters and bytes are what torch counts on a small model."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers as tf

from softprompt.backbone import Base

ROOT = Path(__file__).parents[2]
WEIGHTS = {"mm", "addmm"}


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield import_module("cost_model")
    finally:
        sys.path.remove(str(ROOT / "bench"))
        for name in ("cost_model", "ranks"):
            sys.modules.pop(name, None)


def config_of(shape):
    return tf.LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_width,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tables == 1,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def small(model):
    return model.Shape("small", 3, 64, 4, 2, 16, 160, 300)


@pytest.fixture(scope="module")
def llama(small):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config_of(small)).requires_grad_(False).eval()


def test_parameters_are_those_of_the_models(model, small):
    for shape in (small, *model.BASES[:2]):
        with torch.device("meta"):
            made = tf.LlamaForCausalLM(config_of(shape))
        assert sum(each.numel() for each in made.parameters()) == shape.in_layers + shape.outside
    sizes = [each.in_layers + each.outside for each in model.BASES]
    assert [round(size / 1e9, 1) for size in sizes] == [1.2, 8.0, 32.8, 70.6]


@pytest.fixture(scope="module")
def update(model, llama, small):
    """An update of the small model as `ranks.py` runs and counts it."""
    ranks = import_module("ranks")
    base, work = Base(llama, name="small"), model.Work(rows=3, tokens=12, answer=4, virtual=5)
    assert ranks.shape_of(base) == small
    ids = torch.randint(3, 300, (work.rows, work.tokens))
    step, prompt = ranks.update(base, ids, work, torch.randn(work.virtual, small.width))
    step()
    assert prompt.grad.abs().min() > 0
    return work, ranks.operations(step), ranks.kept(base, step)


def test_an_update_takes_the_operations_that_torch_counts(model, small, update):
    work, counts, _ = update
    attention = sum(count for name, count in counts.items() if name not in WEIGHTS)
    assert sum(counts.get(name, 0) for name in WEIGHTS) == model.products(small, work)
    # Blocks are computed whole, masked pairs included, and no product runs again in backward.
    assert 6 / 7 * model.attention(small, work) <= attention <= 3 * model.attention(small, work)


def test_an_update_keeps_the_bytes_that_torch_saves(model, small, update):
    work, _, kept = update
    assert kept == pytest.approx(model.cost(small, work, 1, "data", size=4).activations, rel=0.05)


def test_the_wire_carries_what_test_sharded_counts(model, small):
    work = model.Work(rows=2, tokens=16, answer=2, virtual=5)
    wires = {way: model.cost(small, work, 4, way, size=4).wire for way in ("data", "fsdp", "tp")}
    assert wires["data"] == 2 * 3 / 4 * 4 * 5 * small.width
    assert wires["fsdp"] == 2 * 3 / 4 * 4 * small.in_layers + wires["data"]
    assert wires["tp"] == 7 * 2 * 3 / 4 * 4 * small.layers * work.stream * small.width
    assert model.cost(small, work, 1, "data").wire == 0
    assert model.cost(small, work, 1, "data").prompt == 16 * 5 * small.width


def test_the_page_shows_the_table(model):
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    for each in model.table(model.Work()):
        assert model.row(each) in page
