"""One handle on a model: what is read is read once, and a pass leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from oracles.families import CAUSAL, causal, seq2seq
from oracles.tokenizers import byte_bpe
from softprompt.backbone import (
    Base,
    Fingerprint,
    products,
    recomputes_layers,
    vocabulary_of,
)
from softprompt.backbone import facts as facts_module
from softprompt.backbone.attention import implementations_of
from softprompt.backbone.products import products_in
from softprompt.errors import BackboneError

V = 64
IDS = torch.tensor([[5, 6, 7, 8]])
VIRTUAL = torch.tensor([[V, V + 1, 5, 6]])
NAME, OTHER = "test_base_attention", "test_base_other"
ran: list[str] = []
"""The attention implementations that layers ran, in order."""


def _recording(name):
    def forward(*args, **kwargs):
        ran.append(name)
        return sdpa_attention_forward(*args, **kwargs)

    return forward


for each in (NAME, OTHER):
    AttentionInterface.register(each, _recording(each))
    AttentionMaskInterface.register(each, sdpa_mask)


@pytest.fixture(autouse=True)
def oned_nn(monkeypatch):
    """As on a machine where oneDNN is the faster one, for layers of any size."""
    ran.clear()
    if torch.backends.mkldnn.is_available():
        monkeypatch.setattr(products, "is_faster_here", lambda: True)
        monkeypatch.setattr(products, "_WORTH", dict.fromkeys(products._WORTH, 1))


def counted(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (calls.append(args), original(*args))[1])
    return calls


def left_behind(model):
    """Return everything that a pass could leave on a model."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    checkpoints = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    return hooks, checkpoints, implementations_of(model), products_in(model)


def virtual_tokens(count=2, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


# --- the handle


def test_handles_are_light_and_share_what_is_known():
    model, words = causal("llama"), byte_bpe()
    base, other = Base(model, words, "tiny"), Base.of(model)
    assert Base.of(base) is base
    assert (base.model, base.tokenizer, base.name) == (model, words, "tiny")
    assert (other.name, repr(base)) == ("", "Base(LlamaForCausalLM, name='tiny')")
    assert base.facts is other.facts
    assert base.fingerprint is other.fingerprint
    assert base.key_value_shape is other.key_value_shape
    assert base.found is other.found
    assert base.lock is other.lock
    assert (base.device, base.dtype) == (torch.device("cpu"), torch.float32)
    assert base.embedding is model.get_input_embeddings()
    assert not base.is_encoder_decoder
    assert Base(seq2seq("t5")).is_encoder_decoder
    with pytest.raises(AttributeError):
        base.name = "other"


def test_a_missing_tokenizer_is_one_clear_error():
    with pytest.raises(BackboneError, match=r"no tokenizer .* LlamaForCausalLM; use Base\(model"):
        _ = Base(causal("llama")).tokenizer


def test_the_lock_is_that_of_the_parts_too():
    model = causal("llama")
    with Base(model).lock, Base(model.base_model).lock:
        assert Base(model).lock is Base(model.base_model).lock


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])  # noqa: S301
def test_copies_start_afresh(copied):
    base = Base(causal("llama"), byte_bpe(), "tiny")
    base.found["probe"] = "fine"
    base.require_attention(NAME)
    other = copied(base)
    assert other.model is not base.model
    assert other.found == {}
    assert other.lock is not base.lock
    assert (other.name, other.facts) == ("tiny", base.facts)
    assert other.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def test_nothing_keeps_a_model_alive():
    model = causal("llama")
    base = Base(model, name="tiny")
    with base.running(attention=NAME, virtual_tokens=virtual_tokens()), torch.no_grad():
        model(VIRTUAL)
    assert base.facts and base.fingerprint and base.key_value_shape
    seen = weakref.ref(model)
    del model, base
    gc.collect()
    assert seen() is None


# --- what is read once


def test_facts_are_read_once(monkeypatch):
    model = causal("llama")
    reads = counted(monkeypatch, facts_module, "_read")
    for _ in range(3):
        assert Base(model).facts.vocabulary == V
    model(IDS)
    assert Base(model).facts is Base(model).facts
    assert len(reads) == 1


@pytest.mark.parametrize("change", ["resized", "replaced", "converted", "written", "padding id"])
def test_facts_are_read_again_after_a_change(monkeypatch, change):
    model = causal("llama")
    base = Base(model)
    before, reads = base.facts, counted(monkeypatch, facts_module, "_read")
    match change:
        case "resized":
            model.resize_token_embeddings(80)
            assert base.facts.vocabulary == 80
        case "replaced":
            model.set_input_embeddings(nn.Embedding(96, 32))
            assert base.facts.vocabulary == 96
        case "converted":
            model.to(torch.bfloat16)
            assert base.facts.embedding_rms == pytest.approx(before.embedding_rms, rel=0.01)
        case "written":
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(2)
            assert base.facts.embedding_rms == pytest.approx(2 * before.embedding_rms)
        case "padding id":
            model.config.pad_token_id = 7
            assert (before.pad_id, base.facts.pad_id) == (0, 7)
    assert base.facts is base.facts
    assert len(reads) == 1


def test_the_fingerprint_is_taken_once(monkeypatch):
    model = causal("llama").requires_grad_(False)
    base, taken = Base(model), Fingerprint.of(model)
    reads = counted(monkeypatch, Fingerprint, "of")
    with base.running(virtual_tokens=virtual_tokens()):
        assert base.fingerprint == base.fingerprint == taken
        model(VIRTUAL)
    assert base.fingerprint == taken
    assert len(reads) == 1


@pytest.mark.parametrize("change", ["written", "converted", "there and back", "loaded", "replaced"])
def test_the_fingerprint_follows_the_weights(change):
    model = causal("llama").requires_grad_(False)
    base = Base(model)
    before = base.fingerprint
    match change:
        case "written":
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.normal_()
        case "converted":
            model.to(torch.bfloat16)
        case "there and back":
            model.half().float()  # storage may come back at the same address
        case "loaded":
            model.load_state_dict(causal("llama", seed=1).state_dict())
        case "replaced":
            model.model.layers[0] = causal("llama", seed=1).model.layers[0]
    assert base.fingerprint == Fingerprint.of(model)
    assert base.fingerprint != before
    assert base.fingerprint.matches(before) == (change in ("converted", "there and back"))


def test_key_value_shape_runs_no_pass_of_the_model():
    model, calls = causal("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert Base(model).key_value_shape == Base(model).key_value_shape
    assert (Base(model).key_value_shape.layers, len(calls)) == (2, 0)


# --- running


@pytest.mark.parametrize("name", [n for n in CAUSAL if n in ("llama", "gpt2", "gemma", "bloom")])
def test_a_pass_leaves_nothing_behind(name):
    model = causal(name).requires_grad_(False)
    base = Base(model)
    width, expected, before = base.facts.token_dim, model(IDS).logits, left_behind(model)
    with base.running(virtual_tokens=virtual_tokens(width=width)):
        assert left_behind(model) != before
        assert model(VIRTUAL).logits.isfinite().all()
    assert left_behind(model) == before
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(IndexError):
        model(VIRTUAL)


def test_everything_at_once_is_given_back_also_after_an_exception():
    model = causal("llama").requires_grad_(False)
    base = Base(model)
    expected, before = model(IDS).logits, left_behind(model)
    with (
        pytest.raises(KeyError),
        base.running(attention=NAME, virtual_tokens=virtual_tokens(), bare=True),
    ):
        model(VIRTUAL)
        raise KeyError
    assert ran == [NAME] * base.facts.num_layers
    assert left_behind(model) == before
    assert products._torch_only.get() is False
    assert torch.equal(model(IDS).logits, expected)


def test_virtual_tokens_are_the_rows_that_are_looked_up():
    model, tokens = causal("llama"), virtual_tokens()
    embeds = torch.cat([tokens, model.get_input_embeddings()(IDS[0, :2])]).unsqueeze(0)
    with Base(model).running(virtual_tokens=tokens, products=()):
        got = model(VIRTUAL).logits
    torch.testing.assert_close(got, model(inputs_embeds=embeds).logits)


def test_a_pass_inside_a_pass():
    model = causal("llama").requires_grad_(False)
    base, first, second = Base(model), virtual_tokens(), virtual_tokens() + 1
    before = left_behind(model)
    with base.running(virtual_tokens=second):
        alone = model(VIRTUAL).logits
    with base.running(attention=NAME):
        with base.running(attention=OTHER):
            model(IDS)
            with Base(model.base_model).running():
                model(IDS)
        between = model.config._attn_implementation
        with base.running(virtual_tokens=second):
            torch.testing.assert_close(model(VIRTUAL).logits, alone)
        model(IDS)
    assert between == NAME
    assert ran == [OTHER] * 4 + [NAME] * 4
    assert left_behind(model) == before
    with pytest.raises(IndexError), base.running(virtual_tokens=first):
        model(torch.tensor([[V + 2]]))
    assert left_behind(model) == before


def test_a_decoder_has_virtual_tokens_of_its_own():
    model = seq2seq("bart")
    base, before = Base(model), left_behind(model)
    with base.running(virtual_tokens=virtual_tokens(), decoder=True):
        assert model(input_ids=IDS, decoder_input_ids=VIRTUAL).logits.isfinite().all()
    assert left_behind(model) == before


def test_hooks_that_are_there_already_are_used_and_kept():
    model = causal("llama")
    base, vocabulary = Base(model), vocabulary_of(model)
    tokens, expected = virtual_tokens(), model(IDS).logits
    before = left_behind(model)
    with base.running(virtual_tokens=tokens):
        wanted = model(VIRTUAL).logits
    with base.running(virtual_tokens=tokens, vocabulary=vocabulary):
        assert left_behind(model)[0] != before[0]  # the products alone
        torch.testing.assert_close(model(VIRTUAL).logits, wanted)
        with base.running(vocabulary=vocabulary, bare=True):
            assert torch.equal(model(IDS).logits, expected)
            with pytest.raises(IndexError):
                model(VIRTUAL)
        torch.testing.assert_close(model(VIRTUAL).logits, wanted)
    assert left_behind(model) == before
    vocabulary.remove()


def test_attention_is_checked_once_and_then_walks_no_modules(monkeypatch):
    model = causal("llama")
    base = Base(model)
    checks = counted(monkeypatch, type(model), "set_attn_implementation")
    base.require_attention(NAME)
    assert model.config._attn_implementation == "sdpa"
    with base.running():  # looks for quantised layers, once
        pass
    monkeypatch.setattr(type(model), "modules", None)
    for _ in range(3):
        with base.running(attention=NAME, products=()), torch.no_grad():
            assert model.config._attn_implementation == NAME
    monkeypatch.undo()
    assert len(checks) == 1
    model.set_attn_implementation("eager")
    with base.running(attention=NAME):
        model(IDS)
    assert (model.config._attn_implementation, len(ran)) == ("eager", 2)


def test_attention_that_is_not_supported_is_refused_and_put_back():
    model = tf.BloomForCausalLM(CAUSAL["bloom"]()).eval()
    base, before = Base(model), left_behind(model)
    with pytest.raises(BackboneError, match="does not honour transformers' attention interface"):
        base.require_attention(NAME)
    with pytest.raises(BackboneError), base.running(attention=NAME):
        pass
    assert left_behind(model) == before


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_run_again_as_they_were_run(reentrant):
    model, tokens = causal("llama").requires_grad_(False), virtual_tokens().requires_grad_()
    base = Base(model)
    with base.running(virtual_tokens=tokens):
        (expected,) = torch.autograd.grad(model(VIRTUAL).logits.sum(), tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    before = left_behind(model)
    with base.running(), base.running(attention=NAME, virtual_tokens=tokens):
        keywords = [
            m._gradient_checkpointing_func.keywords["use_reentrant"]
            for m in model.modules()
            if "_gradient_checkpointing_func" in vars(m)
        ]
        loss = model(VIRTUAL, use_cache=False).logits.sum()
    assert recomputes_layers(model)
    assert set(keywords) == {reentrant}
    assert left_behind(model) == before
    loss.backward()
    assert ran == [NAME] * 4
    assert left_behind(model) == before
    torch.testing.assert_close(tokens.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_pass_may_be_compiled(backend):
    model, tokens = causal("llama"), virtual_tokens()
    vocabulary = vocabulary_of(model)

    def run(given):
        with Base.of(model).running(virtual_tokens=tokens, vocabulary=vocabulary):
            return model(given, use_cache=False).logits

    expected = run(VIRTUAL)
    torch._dynamo.reset()
    got = torch.compile(run, backend=backend)(VIRTUAL)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    vocabulary.remove()
