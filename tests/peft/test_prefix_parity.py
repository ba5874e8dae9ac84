"""What PEFT's prefix tuning does right is matched: logits, loss, gradients, steps, tokens, first values, files."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers as tf

import softprompt
from oracles.families import CAUSAL, ENCODERS, SHARING, A, H, L, build, causal, seq2seq, sharing
from oracles.prefix_pair import P, prefix_pair
from oracles.slow import only

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {
    **{name: ("CAUSAL_LM", lambda name=name: causal(name)) for name in (
        "llama", "gpt2", "qwen2", "mistral", "gemma", "gemma2", "gpt_neox", "opt", "bloom", "gptj", "gpt_neo"
    )},
    **{name: ("CAUSAL_LM", lambda name=name: sharing(name)) for name in SHARING},
    "t5": ("SEQ_2_SEQ_LM", lambda: seq2seq("t5")),
    "bart": ("SEQ_2_SEQ_LM", lambda: seq2seq("bart")),
    "llama-seq": ("SEQ_CLS", lambda: decoder_with_head(tf.AutoModelForSequenceClassification)),
    "llama-token": ("TOKEN_CLS", lambda: decoder_with_head(tf.AutoModelForTokenClassification)),
    "bert-seq": ("SEQ_CLS", lambda: encoder_with_head(tf.AutoModelForSequenceClassification)),
    "bert-token": ("TOKEN_CLS", lambda: encoder_with_head(tf.AutoModelForTokenClassification)),
}  # fmt: skip


def decoder_with_head(loader):
    return build(loader, CAUSAL["llama"](), num_labels=3)


def encoder_with_head(loader):
    return build(loader, ENCODERS["bert"](), num_labels=3)


def batch(task):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    labels = {
        "CAUSAL_LM": ids.masked_fill(mask == 0, -100),
        "SEQ_2_SEQ_LM": torch.randint(3, 64, (3, 4), generator=generator),
        "SEQ_CLS": torch.tensor([0, 1, 2]),
        "TOKEN_CLS": (ids % 3).masked_fill(mask == 0, -100),
    }[task]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def weight(model):
    return model.prompt_encoder["default"].embedding.weight


def live(values, task):
    """Leave out the layers that PEFT gives a seq2seq prefix and never reads."""
    return values.view(P, 2 * L, -1)[:, ::2].flatten(1) if task == "SEQ_2_SEQ_LM" else values


@pytest.mark.parametrize("case", only(["llama", "gemma4", "bloom", "t5", "bert-seq"], CASES))
def test_outputs_loss_and_gradient(case):
    task, model = CASES[case]
    ours, theirs = prefix_pair(task, model())
    inputs = batch(task)
    a, b = ours(**inputs), theirs(**inputs)
    assert a.logits.shape == b.logits.shape
    whole = task in ("SEQ_CLS", "SEQ_2_SEQ_LM")
    real = slice(None) if whole else inputs["attention_mask"].bool()
    torch.testing.assert_close(a.logits[real], b.logits[real], **TOLERANCE)
    torch.testing.assert_close(a.loss, b.loss, **TOLERANCE)
    a.loss.backward()
    b.loss.backward()
    torch.testing.assert_close(weight(ours).grad, live(weight(theirs).grad, task), **TOLERANCE)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"do_sample": False}, marks=pytest.mark.slow),
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "top_k": 5},
    ],
    ids=["greedy", "beams", "sample"],
)
def test_generated_tokens(task, options):
    ours, theirs = prefix_pair(task, causal("llama") if task == "CAUSAL_LM" else seq2seq("t5"))
    ids = batch(task)["input_ids"][[0, 2]]
    tokens = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=7, **options)
        tokens.append(out.tolist())
    assert tokens[0] == tokens[1]


STARTS = [
    {}, {"init_weights": "zero"}, {"prefix_projection": True},
    {"prefix_projection": True, "encoder_hidden_size": 7, "init_weights": "zero"},
]  # fmt: skip


@pytest.mark.parametrize(
    "options", only(STARTS[1:3], STARTS), ids=["direct", "zero", "projected", "projected-zero"]
)
def test_first_values_names_and_training(options):
    ours, theirs = prefix_pair("CAUSAL_LM", causal("qwen2"), **options)
    before = dict(ours.prompt_encoder.named_parameters())
    peers = dict(theirs.prompt_encoder.named_parameters())
    assert before.keys() == peers.keys()
    for name, value in before.items():
        assert torch.equal(value, peers[name])
    inputs = batch("CAUSAL_LM")
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    for name, value in ours.prompt_encoder.named_parameters():
        torch.testing.assert_close(value, peers[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "case", only(["llama", "t5"], ["llama", "gpt2", "gemma", "gemma4", "bloom", "t5", "bart", "llama-seq"])
)
@pytest.mark.parametrize("projected", [False, True])
def test_files_both_ways(case, projected, tmp_path):
    task, make = CASES[case]
    if projected and task != "CAUSAL_LM":
        pytest.skip("a projection is baked in the same way for every task")
    model = make()
    ours, theirs = prefix_pair(task, model, prefix_projection=projected)
    inputs = batch(task)
    expected = ours(**inputs).logits
    real = inputs["attention_mask"].bool() if task == "CAUSAL_LM" else slice(None)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        there = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        here = softprompt.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs")
        again = softprompt.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
        for loaded in (there, here.eval(), again.eval()):
            torch.testing.assert_close(loaded(**inputs).logits[real], expected[real], **TOLERANCE)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["peft_type"] == "PREFIX_TUNING"
    assert not {"freeze_first_token", "prefix_tuning_init_text", "tokenizer_kwargs"} & set(written)


def test_pefts_own_seq2seq_file_gives_what_peft_gives(tmp_path):
    """PEFT hands decoder layer l the values of layer 2 l, taken round: here 0 for both layers."""
    model = seq2seq("t5")
    torch.manual_seed(2)
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    inputs = batch("SEQ_2_SEQ_LM")
    here = softprompt.PeftModel.from_pretrained(model, tmp_path, is_trainable=True).eval()
    output = here(**inputs)
    torch.testing.assert_close(output.logits, theirs(**inputs).logits, **TOLERANCE)
    output.loss.backward()
    rows = weight(here).grad.view(P, L, -1)
    assert rows.shape == (P, L, 2 * H)
    assert bool(rows.abs().sum((0, 2)).gt(0).all()), "every layer that is saved is trained"


def test_a_loaded_projection_trains_directly(tmp_path, caplog):
    model = causal("llama")
    ours, _ = prefix_pair("CAUSAL_LM", model, prefix_projection=True)
    ours.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        again = softprompt.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True)
    assert "trained directly from here" in caplog.text
    again(**batch("CAUSAL_LM")).loss.backward()
    assert weight(again).grad.shape == (P, L * H)  # L * 2 * A_kv * D, with two of A heads
    assert A == 4
    again.save_pretrained(tmp_path / "more")
    written = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert written["prefix_projection"] is False
