"""bench/cost_model.py: its operations, parameters and bytes are what torch counts on a small model."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from softprompt.backbone import Base
from softprompt.engine import EngineRow, build_engine
from softprompt.prompts import Prompt

ROOT = Path(__file__).parents[2]
WEIGHTS = {"mm", "addmm"}


@pytest.fixture(scope="module")
def model():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield import_module("cost_model")
    finally:
        sys.path.remove(str(ROOT / "bench"))
        sys.modules.pop("cost_model", None)


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


def test_an_update_takes_the_operations_that_torch_counts(model, small, llama):
    work = model.Work(rows=3, tokens=12, answer=4, virtual=5)
    base = Base(llama)
    engine = build_engine(base, "forest")
    prompt = Prompt(torch.randn(work.virtual, small.width).requires_grad_())
    drawn = torch.randint(3, 300, (work.rows, work.tokens)).tolist()
    source = work.tokens - work.answer
    rows = [EngineRow(tuple(ids[:source]), tuple(ids[source:]), prompt) for ids in drawn]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts no other on a CPU
        engine.target_log_probs(rows).values.sum().backward()
    counts = {str(name).split(".")[1]: number for name, number in counter.get_flop_counts()["Global"].items()}
    assert sum(counts.pop(name, 0) for name in WEIGHTS) == model.products(small, work)
    # Blocks are computed whole, masked pairs included, and no product runs again in backward.
    assert 6 / 7 * model.attention(small, work) <= sum(counts.values()) <= 3 * model.attention(small, work)


def test_a_layer_keeps_the_bytes_that_torch_saves(model, small, llama):
    tokens = 48
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {each.untyped_storage().data_ptr() for each in [*llama.parameters(), *llama.buffers()]}
    states = torch.randn(1, tokens, small.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = llama.model(inputs_embeds=states, use_cache=False).last_hidden_state
    assert output.requires_grad
    found = sum(size for place, size in saved.items() if place not in weights) / tokens / small.layers
    assert found == pytest.approx(model.kept(small, 4), rel=0.05)


def test_the_wire_carries_what_test_sharded_counts(model, small):
    work = model.Work(rows=2, tokens=16, answer=2, virtual=5)
    wires = {way: model.cost(small, work, 4, way, size=4).wire for way in ("data", "fsdp", "tp")}
    assert wires["data"] == 2 * 3 / 4 * 4 * 5 * small.width
    assert wires["fsdp"] == 2 * 3 / 4 * 4 * small.in_layers
    assert wires["tp"] == 7 * 2 * 3 / 4 * 4 * small.layers * work.stream * small.width
    assert model.cost(small, work, 1, "data").wire == 0
    assert model.cost(small, work, 1, "data").prompt == 16 * 5 * small.width


def test_the_page_shows_the_table(model):
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    for each in model.table(model.Work()):
        assert model.row(each) in page
