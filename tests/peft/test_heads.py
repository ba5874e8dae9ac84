"""Heads trained beside the prompt: which ones, under which names, and never mixed up."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from oracles.families import CAUSAL, ENCODERS, build, causal
from oracles.peft_pair import base, batch
from softprompt import PeftModel, PromptTuningConfig, get_peft_model
from softprompt.errors import ArtifactError, ConfigError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prompted(task, model=None, **options):
    model = model if model is not None else base(task)
    torch.manual_seed(1)
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=3, **options)
    return get_peft_model(model, config).eval()


def shaken(model, name, seed):
    """Give a prompt's heads values of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".modules_to_save.{name}." in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def score_model():
    return build(tf.AutoModelForSequenceClassification, CAUSAL["llama"](), num_labels=3)


HEADS = {
    "SEQ_CLS": (lambda: base("SEQ_CLS"), "classifier"),
    "SEQ_CLS score": (score_model, "score"),
    "TOKEN_CLS": (lambda: base("TOKEN_CLS"), "classifier"),
    "QUESTION_ANS": (lambda: base("QUESTION_ANS"), "qa_outputs"),
}


@pytest.mark.parametrize("case", HEADS)
def test_new_heads_train_and_are_saved_under_pefts_names(case, tmp_path):
    make, head = HEADS[case]
    model = prompted(case.split()[0], make())
    own = [n for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder" not in n]
    assert own
    assert all(n.startswith(f"base_model.{head}.modules_to_save.default.") for n in own)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    parts = {name.rpartition(".")[2] for name in own}
    assert names == {"prompt_embeddings", *(f"base_model.{head}.{part}" for part in parts)}
    assert head in model.peft_config["default"].modules_to_save


@pytest.mark.parametrize("case", HEADS)
def test_trained_heads_come_back(case, tmp_path):
    make, _ = HEADS[case]
    task = case.split()[0]
    model = prompted(task, make())
    shaken(model, "default", 5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    inputs = {key: value for key, value in batch(task).items() if key != "labels"}
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "albert"])
def test_heads_of_other_encoders(family, tmp_path):
    def make():
        return build(tf.AutoModelForSequenceClassification, ENCODERS[family](), num_labels=2)

    model = prompted("SEQ_CLS", make())
    shaken(model, "default", 6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("case", ["SEQ_CLS", "SEQ_CLS score", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_mixed_batch_runs_each_row_through_its_own_head(case):
    make, _ = HEADS[case]
    model = prompted(case.split()[0], make())
    model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2))
    shaken(model, "default", 5)
    shaken(model, "b", 6)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]])
    names = ["b", "__base__", "default", "b"]
    mixed = model(input_ids=ids, adapter_names=names)[0]
    for i, name in enumerate(names):
        alone = model(input_ids=ids[i : i + 1], adapter_names=[name])[0][0]
        columns = alone.shape[0] if alone.dim() == mixed[i].dim() else 0
        text = mixed[i] if case.startswith("SEQ_CLS") else mixed[i][-3:]
        torch.testing.assert_close(text, alone if case.startswith("SEQ_CLS") else alone[-3:], **CLOSE)
        assert columns
    assert not torch.allclose(mixed[0], mixed[1])


def test_disabled_or_unprompted_rows_use_the_original_head():
    untouched, model = base("SEQ_CLS"), prompted("SEQ_CLS")
    shaken(model, "default", 5)
    ids = torch.tensor([[5, 6, 7]])
    expected = untouched(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model(input_ids=ids, adapter_names=["__base__"]).logits, expected)
    assert torch.equal(model.base_model(input_ids=ids).logits, expected)
    assert not torch.allclose(model(input_ids=ids).logits, expected)


def test_only_the_active_head_trains():
    model = prompted("SEQ_CLS")
    model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2))
    for active in ("default", "b"):
        model.set_adapter(active)
        training = {n for n, p in model.named_parameters() if p.requires_grad}
        assert training == {
            f"prompt_encoder.{active}.embedding.weight",
            f"base_model.classifier.modules_to_save.{active}.weight",
            f"base_model.classifier.modules_to_save.{active}.bias",
        }


def test_deleting_a_prompt_deletes_its_head():
    model = prompted("SEQ_CLS")
    model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2))
    model.delete_adapter("b")
    assert not any(".b." in name for name, _ in model.named_parameters())


def test_any_module_can_be_trained_beside_a_prompt(tmp_path):
    model = prompted("CAUSAL_LM", causal("llama", tie_word_embeddings=False), modules_to_save=["lm_head"])
    assert model.num_parameters(only_trainable=True) == 3 * 32 + 64 * 32
    model(**batch("CAUSAL_LM")).loss.backward()
    shaken(model, "default", 7)
    model.save_pretrained(tmp_path)
    assert "base_model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(causal("llama", tie_word_embeddings=False), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.detach()(ids).logits, causal("llama", tie_word_embeddings=False)(ids).logits)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_missing_module_is_refused(task):
    with pytest.raises(ConfigError, match=r"modules_to_save names 'clasifier', but .* has no such module"):
        prompted(task, modules_to_save=["clasifier"])


def test_a_head_over_a_bfloat16_base_is_float32():
    model = prompted("SEQ_CLS", base("SEQ_CLS").to(torch.bfloat16))
    head = model.base_model.classifier.modules_to_save["default"]
    assert head.weight.dtype is torch.float32
    output = model(**batch("SEQ_CLS"))
    output.loss.backward()
    assert head.weight.grad.dtype is torch.float32


def test_a_head_of_another_size_is_refused(tmp_path):
    model = prompted("SEQ_CLS")
    model.save_pretrained(tmp_path)
    other = build(tf.AutoModelForSequenceClassification, ENCODERS["bert"](), num_labels=5)
    other.bert.load_state_dict(model.base_model.bert.state_dict())
    with pytest.raises(ArtifactError, match=r"base_model\.classifier\..* this model needs"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "albert", "distilbert"])
def test_an_encoder_pools_the_first_column_of_every_row(family, side):
    """A shorter prompt or padding before it must not put padding where the head looks."""
    from oracles.naive import padded

    encoder = build(tf.AutoModelForSequenceClassification, ENCODERS[family](), num_labels=3)
    model = prompted("SEQ_CLS", encoder)
    model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=5))
    shaken(model, "default", 5)
    shaken(model, "b", 6)
    rows, names = [[5, 6, 7, 8], [9, 10], [11, 12, 13]], ["b", "default", "__base__"]
    ids, mask = padded(rows, side, pad=encoder.config.pad_token_id)
    mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        alone = model(input_ids=torch.tensor([row]), adapter_names=[name]).logits[0]
        torch.testing.assert_close(mixed[i], alone, **CLOSE)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_repeated_rows_keep_their_heads(options):
    make = {"tie_word_embeddings": False}
    model = prompted("CAUSAL_LM", causal("llama", **make), modules_to_save=["lm_head"])
    model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["lm_head"]))
    shaken(model, "default", 5)
    shaken(model, "b", 6)
    ids, names = torch.tensor([[5, 6, 7], [8, 9, 10]]), ["b", "default"]
    if options.get("do_sample"):
        options = {**options, "top_k": 1}
    options = {"max_new_tokens": 4, "eos_token_id": None, **options}
    both = model.generate(input_ids=ids, adapter_names=names, **options)
    alone = [model.generate(input_ids=ids[i : i + 1], adapter_names=[names[i]], **options) for i in (0, 1)]
    assert both.tolist() == torch.cat(alone).tolist()
