"""Prompts before the decoder of seq2seq models: trained, generated with, saved, and alone as in a batch."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from oracles.caches import CACHE
from oracles.families import ENCODERS, SEQ2SEQ, build, causal, seq2seq
from oracles.naive import padded
from oracles.slow import only
from softprompt import PeftModel, PromptTuningConfig, get_peft_model
from softprompt.backbone import input_embedding
from softprompt.errors import ConfigError, ContextOverflowError

P = 4
ROWS = [[5, 6, 7, 8, 9], [20, 21, 22]]
LABELS = torch.tensor([[11, 12, 13], [14, 15, 2]])
NAMES = list(SEQ2SEQ)
TYPES = [["DECODER"], ["ENCODER", "DECODER"]]


def config(types, length=P):
    return PromptTuningConfig(task_type="SEQ_2_SEQ_LM", output_model_types=types, num_virtual_tokens=length)


def parts(prompted, name="default"):
    """Return a prompt's encoder rows, or none, and its decoder rows."""
    value = prompted.prompt_encoder[name].embedding.weight
    both = prompted.peft_config[name].output_model_types == ["ENCODER", "DECODER"]
    return (value[: len(value) // 2], value[len(value) // 2 :]) if both else (value[:0], value)


def solo_logits(model, prompted, row, decoder_ids, name="default"):
    """Return the decoder's logits of one row, embeddings put together by hand."""
    first, second = parts(prompted, name)
    source = torch.cat([first, input_embedding(model)(torch.tensor(row))]).unsqueeze(0)
    states = model.get_encoder()(inputs_embeds=source)
    table = model.get_decoder().get_input_embeddings()
    decoder = torch.cat([second, table(decoder_ids)]).unsqueeze(0)
    return model(encoder_outputs=states, decoder_inputs_embeds=decoder).logits[0]


@pytest.mark.parametrize("types", TYPES, ids="+".join)
@pytest.mark.parametrize("name", only(["t5", "bart"], NAMES))
def test_logits_loss_and_gradients(name, types):
    model = seq2seq(name)
    prompted = get_peft_model(model, config(types))
    ids, mask = padded(ROWS, "right", pad=model.config.pad_token_id)
    out = prompted(input_ids=ids, attention_mask=mask, labels=LABELS)
    assert out.logits.shape[1] == P + 3
    starts = model.prepare_decoder_input_ids_from_labels(labels=LABELS)
    loss = torch.zeros(())
    for i, row in enumerate(ROWS):
        expected = solo_logits(model, prompted, row, starts[i])
        torch.testing.assert_close(out.logits[i], expected, atol=2e-5, rtol=1e-5)
        loss = loss + torch.nn.functional.cross_entropy(expected[P:], LABELS[i]) / 2
    torch.testing.assert_close(out.loss, loss)
    weight = prompted.prompt_encoder["default"].embedding.weight
    (expected,) = torch.autograd.grad(loss, weight)
    (got,) = torch.autograd.grad(out.loss, weight)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    assert (got[-P:].abs().sum(1) > 0).all()


@pytest.mark.parametrize("use_cache", only([True], [True, False]))
@pytest.mark.parametrize("types", TYPES, ids="+".join)
@pytest.mark.parametrize("name", only(["t5", "bart"], NAMES))
def test_generation_equals_solo(name, types, use_cache):
    model = seq2seq(name)
    prompted = get_peft_model(model, config(types))
    ids, mask = padded(ROWS, "right", pad=model.config.pad_token_id)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
    out = prompted.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **options)
    for i, row in enumerate(ROWS):
        for step in range(1, out.shape[1]):
            with torch.no_grad():
                logits = solo_logits(model, prompted, row, out[i, :step])[-1]
            logits[model.generation_config.eos_token_id] = -torch.inf
            assert int(logits.argmax()) == int(out[i, step])
    beams = prompted.generate(
        input_ids=ids, attention_mask=mask, **{**options, "num_beams": 3, "num_return_sequences": 2}
    )
    alone = prompted.generate(
        input_ids=torch.tensor(ROWS[1:]), **{**options, "num_beams": 3, "num_return_sequences": 2}
    )
    assert torch.equal(beams[2:], alone)


@pytest.mark.parametrize("name", only(["t5", "bart"], NAMES))
def test_mixed_batches_equal_solo(name):
    model = seq2seq(name)
    prompted = get_peft_model(model, config(["DECODER"]), "decoder")
    prompted.add_adapter("both", config(["ENCODER", "DECODER"], 2))
    prompted.add_adapter("encoder", config(["ENCODER"], 3))
    rows, names = [*ROWS, [30, 31], [5, 6]], ["both", "decoder", "encoder", "__base__"]
    ids, mask = padded(rows, "right", pad=model.config.pad_token_id)
    labels = torch.tensor([[11, 12, 13], [14, 15, 2], [16, 17, 18], [19, 3, 4]])
    with torch.no_grad():
        out = prompted(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=names)
        losses = []
        for i, (row, adapter) in enumerate(zip(rows, names, strict=True)):
            alone = prompted(input_ids=torch.tensor([row]), labels=labels[i : i + 1], adapter_names=[adapter])
            losses.append(alone.loss)
            got = out.logits[i, : alone.logits.shape[1]]
            torch.testing.assert_close(got, alone.logits[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    with pytest.raises(ConfigError, match="decoder prompts of one length"):
        prompted.generate(input_ids=ids, attention_mask=mask, adapter_names=names, max_new_tokens=5)
    same = ["decoder"] * 4
    got = prompted.generate(input_ids=ids, attention_mask=mask, adapter_names=same, max_new_tokens=5)
    assert got.shape[0] == 4


def test_a_filled_cache_is_not_prompted_again():
    model = seq2seq("t5")
    prompted = get_peft_model(model, config(["DECODER"]))
    ids, start = torch.tensor(ROWS[:1]), torch.tensor([[0, 11, 12]])
    with torch.no_grad():
        whole = prompted(input_ids=ids, decoder_input_ids=start).logits
        first = prompted(input_ids=ids, decoder_input_ids=start[:, :2], use_cache=True)
        rest = prompted(
            encoder_outputs=(first.encoder_last_hidden_state,),
            decoder_input_ids=start[:, 2:],
            **{CACHE: first[CACHE]},
        )
    torch.testing.assert_close(rest.logits[0, -1], whole[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("types", only(TYPES[1:], TYPES), ids="+".join)
def test_files(types, tmp_path):
    model = seq2seq("bart")
    prompted = get_peft_model(model, config(types))
    inputs = {"input_ids": torch.tensor(ROWS[:1]), "labels": LABELS[:1]}
    expected = prompted(**inputs).logits
    prompted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seq2seq("bart"), tmp_path)
    assert again.active_peft_config.output_model_types == types
    assert torch.equal(again(**inputs).logits, expected)
    peft = pytest.importorskip("peft")
    with pytest.raises(KeyError, match="EXTENDED_PROMPT_TUNING"):
        peft.PeftModel.from_pretrained(seq2seq("bart"), tmp_path)


@torch.no_grad()
def test_disabled_it_is_the_base():
    model = seq2seq("t5")
    inputs = {"input_ids": torch.tensor(ROWS[:1]), "labels": LABELS[:1]}
    before = model(**inputs).logits
    tokens = model.generate(inputs["input_ids"], max_new_tokens=5)
    prompted = get_peft_model(model, config(["ENCODER", "DECODER"]))
    with prompted.disable_adapter():
        assert torch.equal(prompted(**inputs).logits, before)
        assert torch.equal(prompted.generate(inputs["input_ids"], max_new_tokens=5), tokens)
    assert torch.equal(prompted.detach()(**inputs).logits, before)


@pytest.mark.parametrize(("kind", "right"), [("bert", "ENCODER"), ("llama", "DECODER")])
def test_a_model_with_one_input_has_one_part(tmp_path, kind, right):
    def model():
        if kind == "llama":
            return causal("llama")
        return build(tf.AutoModelForSequenceClassification, ENCODERS[kind](), num_labels=2)

    # Without a task type the configuration cannot know how many parts there are.
    for task in (None, "CAUSAL_LM" if kind == "llama" else "SEQ_CLS"):
        fits = PromptTuningConfig(task, output_model_types=[right], num_virtual_tokens=P)
        prompted = get_peft_model(model(), fits)
        assert prompted.active_peft_config.peft_type == "PROMPT_TUNING"
        assert prompted(input_ids=torch.tensor(ROWS[:1])).logits.isfinite().all()
        for types in [*TYPES, ["ENCODER"]]:
            if types != [right]:
                with pytest.raises(ConfigError, match=rf"of {kind}, an? .* is \['{right}'\]"):
                    get_peft_model(
                        model(),
                        PromptTuningConfig(task, output_model_types=types, num_virtual_tokens=P),
                    )


def test_what_cannot_be_is_refused():
    model = seq2seq("bart")
    prompted = get_peft_model(model, config(["DECODER"], 8))
    ids = torch.tensor(ROWS[:1])
    with pytest.raises(ConfigError, match="needs decoder_input_ids or labels"):
        prompted(input_ids=ids)
    long = torch.ones(1, 60, dtype=torch.long)
    with pytest.raises(ContextOverflowError, match=r"60 \+ 8 virtual tokens exceed the decoder's"):
        prompted(input_ids=ids, decoder_input_ids=long)
    with pytest.raises(ContextOverflowError, match="8 virtual tokens"):
        prompted.generate(ids, max_new_tokens=60)
    with pytest.raises(ConfigError, match="static cache"):
        prompted.generate(ids, cache_implementation="static")
    with pytest.raises(ConfigError, match="output_model_types must be one of"):
        config(["MIDDLE"])
