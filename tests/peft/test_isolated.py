"""Encoder prompts that do not see the input: opt-in, saved, honoured, refused by PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf

import softprompt
from oracles.families import ENCODERS, ROTARY_ENCODERS, SEQ2SEQ, build, causal, seq2seq
from oracles.naive import padded
from oracles.slow import only
from softprompt import PeftModel, PromptTuningConfig, get_peft_model
from softprompt.engine.forest.layers import layers_of
from softprompt.errors import ConfigError
from softprompt.peft import inputs as peft_inputs

CLOSE = {"atol": 2e-6, "rtol": 1e-5}
ROWS = [[5, 6, 7, 8, 2], [11, 2], [21, 22, 2]]


def isolated(model, **config):
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=5, prompt_sees_input=False, **config)).eval()


def classifier(name):
    return build(tf.AutoModelForSequenceClassification, ENCODERS[name](), num_labels=3)


@pytest.mark.parametrize("name", ["bert", "electra", "distilbert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier_rows_equal_alone_and_depend_on_the_text(name, side):
    ours = isolated(classifier(name))
    ids, mask = padded(ROWS, side)
    logits = ours(input_ids=ids, attention_mask=mask).logits
    for i, row in enumerate(ROWS):
        solo = ours(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[i], solo, **CLOSE)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("name", only(["bert", "gte"], ["bert", "electra", "distilbert", "eurobert", "gte"]))
def test_prompts_are_computed_once(name, task, monkeypatch):
    """Two prompts and none in a batch: outputs and gradients equal those of the padded mask."""
    loader = {
        "SEQ_CLS": tf.AutoModelForSequenceClassification,
        "TOKEN_CLS": tf.AutoModelForTokenClassification,
        "FEATURE_EXTRACTION": tf.AutoModel,
    }[task]
    config = {**ENCODERS, **ROTARY_ENCODERS}[name]()
    # EuroBERT's default pools with the mask, and breaks on one of four dimensions.
    ours = isolated(build(loader, config, classifier_pooling="bos"), task_type=task)
    short = PromptTuningConfig(num_virtual_tokens=2, prompt_sees_input=False, task_type=task)
    ours.add_adapter("b", short)
    ours.eval().prompt_encoder["b"].requires_grad_(True)
    rows = [*ROWS, [31, 32, 33, 34, 35, 2], [41]]
    names = ["default", "b", "default", "b", "__base__"]
    ids, mask = padded(rows, "right")
    weights = [ours.prompt_encoder[n].embedding.weight for n in ("default", "b")]
    tokens = []
    layers = layers_of(ours.base_model.base_model, windows=True)
    layers[-1].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:2]))

    def run():
        output = ours(input_ids=ids, attention_mask=mask, adapter_names=names)
        values = output[0]
        if task != "SEQ_CLS":
            values = torch.cat(
                [values[i, 5 : 5 + len(row)] for i, row in enumerate(rows)] + [values[0, :5], values[1, 3:5]]
            )
        return values, *torch.autograd.grad(values.square().sum(), weights)

    packed = run()
    assert tokens[-1] == (1, 5 + 2 + sum(map(len, rows)))
    monkeypatch.setattr(peft_inputs, "packs", lambda *_, **__: False)
    for got, expected in zip(packed, run(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert tokens[-1] == (5, 5 + 6)


def test_the_prompts_own_states_ignore_the_input():
    model = build(tf.AutoModel, ENCODERS["bert"]())
    ours = isolated(model)
    seeing = get_peft_model(
        build(tf.AutoModel, ENCODERS["bert"]()), PromptTuningConfig(num_virtual_tokens=5)
    ).eval()
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])
    states = [ours(input_ids=ids).last_hidden_state[:, :5] for ids in (first, second)]
    assert torch.equal(*states)
    states = [seeing(input_ids=ids).last_hidden_state[:, :5] for ids in (first, second)]
    assert not torch.allclose(*states)


@pytest.mark.parametrize("name", only(["t5", "bart"], SEQ2SEQ))
def test_seq2seq_rows_equal_alone(name):
    ours = isolated(seq2seq(name))
    ids, mask = padded(ROWS, "right")
    labels = torch.randint(3, 64, (3, 4))
    logits = ours(input_ids=ids, attention_mask=mask, labels=labels).logits
    # mT5's logits reach 24, and those of the bare base differ by 7e-6 between a batch and a row alone.
    close = {"atol": 1e-6 * max(1.0, float(logits.detach().abs().max())), "rtol": 1e-5}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = ours.generate(input_ids=ids, attention_mask=mask, **options)
    for i, row in enumerate(ROWS):
        one = torch.tensor([row])
        alone = ours(input_ids=one, labels=labels[i : i + 1]).logits[0]
        torch.testing.assert_close(logits[i], alone, **close)
        assert tokens[i].tolist() == ours.generate(input_ids=one, **options)[0].tolist()


def test_saved_loaded_and_refused_by_peft(tmp_path):
    ours = isolated(classifier("bert"))
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier("bert"), tmp_path).eval()
    assert not again.active_peft_config.prompt_sees_input
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(again(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert "`prompt_sees_input=False`" in (tmp_path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(KeyError, match="EXTENDED_PROMPT_TUNING"):
        peft.PeftModel.from_pretrained(classifier("bert"), tmp_path)


IDS = torch.tensor([[5, 6, 7]])


def test_refused_where_it_would_be_ignored_or_cannot_be_had():
    with pytest.raises(ConfigError, match="would be ignored"):
        isolated(causal("llama"))
    with pytest.raises(ConfigError, match="explicit positions"):
        isolated(classifier("roberta"))
    long = tf.LongT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, local_radius=3)
    with pytest.raises(ConfigError, match=r"in LongT5\w+: it takes no mask of our own"):
        isolated(build(tf.AutoModelForSeq2SeqLM, long))(input_ids=IDS, labels=IDS)
    with pytest.raises(ConfigError, match="layers see only a window"):
        isolated(build(tf.AutoModelForTokenClassification, ROTARY_ENCODERS["modernbert"]()))(input_ids=IDS)
    ours = isolated(classifier("bert"))
    with pytest.raises(ConfigError, match="share prompt_sees_input=False"):
        ours.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.slow
def test_tuned_and_used_again(tmp_path):
    from oracles.tokenizers import byte_bpe

    tokenizer = byte_bpe()
    config = SEQ2SEQ["t5"]()
    config.vocab_size = len(tokenizer)
    model = build(tf.AutoModelForSeq2SeqLM, config)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"input": f"text {i}", "output": "good" if i % 2 else "bad"} for i in range(8)]
    tuned = softprompt.tune(
        tmp_path / "base",
        rows,
        num_epochs=1,
        tuning_config={"num_virtual_tokens": 4, "prompt_sees_input": False},
        output=tmp_path / "prompt",
        silence_progress_bars=True,
    )
    assert tuned.engine.name == "forest"
    loaded = softprompt.load(tmp_path / "prompt")
    assert not loaded.config.prompt_sees_input
    texts = ["text 3", "something else"]
    assert [s.scores for s in loaded.classify(texts)] == [s.scores for s in tuned.classify(texts)]
