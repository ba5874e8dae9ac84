"""oneDNN's products against torch's own: same numbers, same gradients, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from oracles.rows import RowCase, engine_rows
from softprompt import PromptTuningConfig, get_peft_model
from softprompt.backbone import (
    Base,
    Fingerprint,
    frozen_linears,
    products,
    swapped_forwards,
    torch_products,
)
from softprompt.backbone.products import FrozenLinear, padded_rows, products_in
from softprompt.engine import (
    DecodeForest,
    ForestEngine,
    NewTokens,
    build_engine,
    why_undecodable,
)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
KINDS = ["linear", "linear without bias", "conv1d"]


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """As on a machine where oneDNN is the faster one, for layers of any size."""
    monkeypatch.setattr(products, "is_faster_here", lambda: True)
    monkeypatch.setattr(products, "_WORTH", dict.fromkeys(products._WORTH, 1))


def layer(kind, trainable=False):
    torch.manual_seed(0)
    made = Conv1D(24, 16) if kind == "conv1d" else nn.Linear(16, 24, bias="without" not in kind)
    if getattr(made, "bias", None) is not None:
        nn.init.normal_(made.bias)
    return made.requires_grad_(trainable)


def used(monkeypatch):
    """Count the calls that oneDNN gets."""
    calls = []
    original = products._multiplied
    monkeypatch.setattr(products, "_multiplied", lambda *args: (calls.append(args), original(*args))[1])
    return calls


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 7), (2, 3, 4)])
def test_same_numbers(monkeypatch, kind, shape, keep):
    module, x = layer(kind), torch.randn(*shape, 16)
    wanted = module(x)
    calls = used(monkeypatch)
    with torch.no_grad(), swapped_forwards([FrozenLinear(module, keep=keep)]):
        torch.testing.assert_close(module(x), wanted, atol=1e-6, rtol=1e-5)
        strided = torch.randn(16, *shape).movedim(0, -1)
        torch.testing.assert_close(module(strided), type(module).forward(module, strided), atol=1e-6, rtol=1e-5)
    assert len(calls) == 2


@pytest.mark.skipif(not products.orders_bfloat16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_ordered_bfloat16_is_torchs(monkeypatch, kind, rows):
    """To the bit: torch leaves these products to oneDNN too, which orders the weight each time."""
    module, x = layer(kind).bfloat16(), torch.randn(rows, 16, dtype=torch.bfloat16)
    calls = used(monkeypatch)
    assert frozen_linears(module) == []
    with torch.no_grad(), swapped_forwards(frozen_linears(module, keep=True)):
        assert torch.equal(module(x), type(module).forward(module, x))
        assert len(calls) == 1
        with pytest.raises(RuntimeError, match="dtype"):
            module(x.float())
        module.float()
        module(x.float())
    assert len(calls) == 1


def test_few_numbers_of_rows_are_compiled_for():
    """oneDNN keeps a kernel for each, so they must not be as many as batches have lengths."""
    counts = range(1, 2049)
    assert all(count <= padded_rows(count) for count in counts)
    assert all(padded_rows(count) <= 1.5 * count for count in counts)
    assert len({padded_rows(count) for count in counts}) == 128
    assert all(padded_rows(padded_rows(count)) == padded_rows(count) for count in counts)


@pytest.mark.parametrize("rows", [17, 255, 257, 400])
def test_rows_between(rows):
    module, x = layer("linear"), torch.randn(rows, 16)
    with torch.no_grad(), swapped_forwards(frozen_linears(module)):
        found = module(x)
    torch.testing.assert_close(found, module(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_same_gradients(monkeypatch, kind):
    module = layer(kind)
    found = []
    calls = used(monkeypatch)
    for bodies in ([], frozen_linears(module)):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with swapped_forwards(bodies):
            module(x).sin().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
    assert len(calls) == 2, "forward and backward"


def test_gradient_of_a_gradient():
    module, x = layer("linear"), torch.randn(3, 16, requires_grad=True)
    with swapped_forwards(frozen_linears(module)):
        (once,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    (plain,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(twice, wanted, atol=1e-4, rtol=1e-4)


def test_others_keep_their_own_product(monkeypatch):
    calls = used(monkeypatch)
    trained = layer("linear", trainable=True)
    with swapped_forwards(frozen_linears(trained)):
        trained(torch.randn(3, 16)).sum().backward()
    assert trained.weight.grad is not None and trained.bias.grad is not None
    frozen = layer("linear")
    with swapped_forwards(frozen_linears(frozen)):
        assert frozen(torch.empty(0, 16)).shape == (0, 24)
        with torch.autocast("cpu", torch.bfloat16):
            assert frozen(torch.randn(3, 16)).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        other = layer("linear").to(dtype)
        with swapped_forwards(frozen_linears(other)):
            assert other(torch.randn(3, 16, dtype=dtype)).dtype == dtype
    assert not calls


def test_nothing_is_left_behind():
    module = layer("linear")
    before = set(vars(module))
    with pytest.raises(RuntimeError), swapped_forwards(frozen_linears(module)):
        raise RuntimeError
    assert set(vars(module)) == before
    module.forward = lambda x: x  # somebody else's
    with swapped_forwards(frozen_linears(module)):
        x = torch.randn(2, 16)
        assert module(x) is x
    assert "forward" in vars(module)


def test_inside_one_another():
    module = layer("linear")
    outer = frozen_linears(module)
    with swapped_forwards(outer):
        with swapped_forwards(frozen_linears(module)):
            assert products_in(module) == outer
        assert products_in(module) == outer
    assert products_in(module) == []


def test_what_others_do_to_a_layer_meanwhile_stays():
    first, second, third = layer("linear"), layer("linear"), layer("linear")
    with swapped_forwards([FrozenLinear(each, keep=False) for each in (first, second, third)]):
        del first.forward
        second.forward = own = lambda x: x
    assert "forward" not in vars(first)
    assert second.forward is own
    assert products_in(third) == []


def pickled(module):
    return pickle.loads(pickle.dumps(module))  # noqa: S301 - our own


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_made_meanwhile_have_their_own_products(monkeypatch, copied):
    module, x = nn.Sequential(layer("linear")), torch.randn(3, 16)
    with swapped_forwards(frozen_linears(module)):
        other = copied(module)
    calls = used(monkeypatch)
    nn.init.zeros_(module[0].weight)
    nn.init.zeros_(module[0].bias)
    assert other(x).abs().max() > 0
    assert not calls


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("write", [Tensor.mul_, Tensor.add_])
def test_products_may_be_written_to(rows, write):
    """A view that a Function returns may not be, and models write into what a layer returns."""
    module, found = layer("linear"), []
    for bodies in ([], frozen_linears(module)):
        x = torch.ones(1, rows, 16, requires_grad=True)
        with swapped_forwards(bodies):
            write(module(x), 2).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def _dual(module, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))).tangent


def _counted(module, x):
    with FlopCounterMode(display=False) as counter:
        module(x)
    return torch.tensor(counter.get_total_flops())


def _batched_gradients(module, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x), x, torch.ones(2, 3, 24), is_grads_batched=True)[0]


WATCHERS = {
    "vmap": lambda module, x: torch.func.vmap(module)(x),
    "grad": lambda module, x: torch.func.grad(lambda given: module(given).sin().sum())(x),
    "jvp": lambda module, x: torch.func.jvp(module, (x,), (x,))[1],
    "forward mode": _dual,
    "batched gradients": _batched_gradients,
    "trace": lambda module, x: torch.jit.trace(module, x)(x),
    "compile": lambda module, x: torch.compile(module, backend="eager", fullgraph=True)(x),
    "flops": _counted,
    "named": lambda module, x: module(input=x),
    "sparse": lambda module, x: module(torch.eye(16).to_sparse()),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("watcher", list(WATCHERS))
def test_who_looks_at_operations_sees_torch_s_own(watcher, keep):
    """Forward-mode derivatives would be dropped in silence; the others would raise."""
    module, x = layer("linear"), torch.randn(3, 16)
    expected = WATCHERS[watcher](module, x)
    with swapped_forwards(frozen_linears(module, keep=keep)):
        found = WATCHERS[watcher](module, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_wrong_shapes_are_told_as_torch_tells_them():
    module = layer("linear")
    with swapped_forwards(frozen_linears(module)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(torch.randn(3, 15))
        with pytest.raises(RuntimeError, match="at least 1D"):
            module(torch.tensor(1.0))


def test_checkpoints_take_either_product():
    """What is saved has one shape, so a layer may be run again under a counter, or without."""
    module, x = layer("linear"), torch.randn(3, 16, requires_grad=True)
    with swapped_forwards(frozen_linears(module)):
        with FlopCounterMode(display=False):
            result = checkpoint(module, x, use_reentrant=False)
        result.sum().backward()
    assert x.grad is not None


def test_switched_off_by_torch_s_own_switch():
    module = layer("linear")
    torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.enabled sets
    try:
        assert frozen_linears(module) == []
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_compiled_parts_are_compiled_once():
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7, 8]])
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    compiled = []

    def count(graph, _):
        compiled.append(graph)
        return graph.forward

    model.model.layers[0].mlp.compile(backend=count, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            prompted(input_ids=ids)
    assert len(compiled) == 1
    layer_by_assignment = layer("linear")
    layer_by_assignment.forward = torch.compile(layer_by_assignment.forward)
    assert frozen_linears(nn.Sequential(layer("linear"), layer_by_assignment)) == []


def test_a_part_that_torch_lacks(monkeypatch):
    assert products._has_its_parts()
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    assert not products._has_its_parts()


def test_kept_copy_goes_when_the_weight_leaves():
    module, x = layer("linear"), torch.randn(3, 16)
    body = FrozenLinear(module, keep=True)
    with torch.no_grad(), swapped_forwards([body]):
        for _ in range(5):
            module(x)
            assert body._kept is not None
            # The address may come back with other numbers.
            module.half().float()
            wanted = F.linear(x, module.weight, module.bias)
            torch.testing.assert_close(module(x), wanted, atol=1e-6, rtol=1e-5)
        module.double()
        module(x.double())
    assert body._kept is None


def test_decoding_keeps_no_copy_after_its_end():
    forest = DecodeForest(Base(tiny("llama")), 64)
    (lane,) = forest.store.take(8, 1)
    forest.step([NewTokens(lane, (5, 6, 7))])
    kept = [weakref.ref(body._kept[2]) for body in forest._products if body._kept is not None]
    assert kept and all(each() is not None for each in kept)
    del forest, lane
    gc.collect()
    assert all(each() is None for each in kept)


@pytest.mark.parametrize("change", ["written", "replaced data", "replaced"])
def test_kept_copy_follows_the_weight(change):
    module, x = layer("linear"), torch.randn(3, 16)
    body = FrozenLinear(module, keep=True)
    with torch.no_grad(), swapped_forwards([body]):
        module(x)
        if change == "written":
            module.weight.mul_(2)
        elif change == "replaced data":
            module.weight.data = module.weight.data * 2
        else:
            module.weight = nn.Parameter(module.weight * 2, requires_grad=False)
        wanted = F.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_small_products_are_torchs(monkeypatch, kind):
    monkeypatch.setattr(products, "_WORTH", {torch.float32: 3 * 16 * 24})
    calls, module = used(monkeypatch), layer(kind)
    with swapped_forwards(frozen_linears(module)):
        module(torch.randn(2, 16))
        assert not calls
        module(torch.randn(3, 16))
        assert len(calls) == 1


def test_torch_alone():
    module = layer("linear")
    with torch_products():
        assert frozen_linears(module) == []
    assert len(frozen_linears(module)) == 1


@pytest.mark.parametrize("decoding", [False, True])
def test_wrong_products_are_declined(monkeypatch, decoding):
    """The probe compares with torch's own products, so it sees what a broken oneDNN does."""
    original = products._multiplied
    monkeypatch.setattr(products, "_multiplied", lambda *args: original(*args) * 1.01)
    if decoding:
        assert "differ" in why_undecodable(Base(tiny("gpt2")))
    else:
        assert build_engine(Base(tiny("gpt2"))).name == "plain"


@pytest.mark.parametrize(
    ("capability", "cpu", "faster"),
    [
        ("AVX512", b"vendor_id : AuthenticAMD", True),
        ("AVX512", b"vendor_id : GenuineIntel", False),
        ("AVX2", b"vendor_id : AuthenticAMD", False),
        ("AVX512", None, False),
    ],
)
def test_the_machine_decides(monkeypatch, capability, cpu, faster):
    monkeypatch.undo()

    def read(_):
        if cpu is None:
            raise OSError
        return cpu

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(Path, "read_bytes", read)
    products.is_faster_here.cache_clear()
    try:
        assert products.is_faster_here() is faster
    finally:
        products.is_faster_here.cache_clear()


def tiny(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        made = GPT2LMHeadModel(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
        )
    else:
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    return made.eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_training_pass(monkeypatch, kind, checkpointing):
    model = tiny(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for each in model.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
    before = Fingerprint.of(model)
    rows = [RowCase((5, 6, 7), (8, 9)), RowCase((11,), (12,)), RowCase((5, 6), (3, 4))]
    found = []
    for faster in (False, True):
        monkeypatch.setattr(products, "is_faster_here", lambda faster=faster: faster)
        calls = used(monkeypatch)
        prompt = (torch.randn(4, 32, generator=torch.Generator().manual_seed(1))).requires_grad_()
        scores = ForestEngine(Base(model), trusted=True).target_log_probs(engine_rows(rows, [prompt])).values
        passed = len(calls)
        scores.sum().backward()
        found.append((scores.detach(), prompt.grad))
        linears = sum(type(each) in (nn.Linear, Conv1D) for each in model.modules())
        # Backward runs a product for each of forward's, and recomputed layers both.
        again = linears - 1 if checkpointing else 0
        assert len(calls) - passed == (linears + again if faster else 0)
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert Fingerprint.of(model) == before
    assert products_in(model) == []


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoding_pass(monkeypatch, kind, ordered):
    model = tiny(kind)
    ids = (5, 6, 7, 8)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    calls = used(monkeypatch)
    forest = DecodeForest(Base(copy.deepcopy(model)), 64, ordered_weights=ordered)
    (lane,) = forest.store.take(8, 1)
    (first,) = forest.step([NewTokens(lane, ids[:3], wanted="all")])
    (last,) = forest.step([NewTokens(lane, ids[3:])])
    torch.testing.assert_close(torch.cat([first, last]), wanted, atol=1e-5, rtol=1e-4)
    assert calls


def test_the_base_alone_is_bit_for_bit_the_base():
    model, ids = tiny("gpt2"), torch.tensor([[5, 6, 7, 8]])
    expected = copy.deepcopy(model)(ids).logits
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not torch.equal(prompted(input_ids=ids).logits[:, -4:], expected)
    with prompted.disable_adapter():
        assert torch.equal(prompted(input_ids=ids).logits, expected)
    assert torch.equal(prompted(input_ids=ids, adapter_names=["__base__"]).logits[:, -4:], expected)
    assert torch.equal(prompted.detach()(ids).logits, expected)


def test_the_base_alone_inside_a_prompted_pass():
    model, ids, found = tiny("gpt2"), torch.tensor([[5, 6, 7, 8]]), []
    expected = copy.deepcopy(model)(ids).logits
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    def ask(*_):
        if not found:
            found.append(None)
            with prompted.disable_adapter():
                found[0] = prompted(input_ids=ids).logits

    model.transformer.h[0].register_forward_hook(ask)
    prompted(input_ids=ids)
    assert torch.equal(found[0], expected)
