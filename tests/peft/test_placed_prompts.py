"""Prompts behind the first token, behind the input, and anywhere else: batched equals alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from oracles.families import CAUSAL, ENCODERS, SEQ2SEQ, build, causal
from oracles.naive import padded
from oracles.slow import only
from softprompt import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.backbone import input_embedding
from softprompt.errors import BackboneError, ConfigError, DataError

ROWS = [[1, 6, 7, 8, 9, 10, 11, 12, 13], [1, 21, 22], [30, 31, 32, 33, 34], [1, 5, 6, 9]]
NAMES = ["bos", "suffix", "bos", "prefix"]
AT = [1, 3, 0, 0]
"""The third row begins with no BOS, so its prompt stands in front."""
LENGTHS = {"bos": 4, "suffix": 3, "prefix": 6}
MODELS = ["llama", "gpt2", "mistral", "gemma2", "qwen3", "bloom", "gptj", "gpt_neox"]


def config(task, placement, length=4, **options):
    return PromptTuningConfig(task_type=task, placement=placement, num_virtual_tokens=length, **options)


def attached(name):
    model = causal(name)
    prompted = get_peft_model(model, config("CAUSAL_LM", "after_bos", LENGTHS["bos"]), "bos")
    prompted.add_adapter("suffix", config("CAUSAL_LM", "suffix", LENGTHS["suffix"]))
    prompted.add_adapter("prefix", config("CAUSAL_LM", "prefix", LENGTHS["prefix"]))
    return model, prompted


def placed(model, prompted, name, row, at):
    """Return the embeddings ``[1, P + T, H]`` of one row with its prompt in its place."""
    text = input_embedding(model)(torch.tensor(row))
    rows = prompted.prompt_encoder[name].materialize().detach().to(text.dtype)
    return torch.cat([text[:at], rows, text[at:]]).unsqueeze(0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_placements_equal_solo(name, side):
    model, prompted = attached(name)
    ids, mask = padded(ROWS, side)
    with torch.no_grad():
        logits = prompted(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
        for i, row in enumerate(ROWS):
            whole = placed(model, prompted, NAMES[i], row, AT[i])
            expected = model(inputs_embeds=whole).logits[0]
            lead = int(mask[i].argmax())
            begin = 6 + lead - LENGTHS[NAMES[i]]
            got = logits[i, begin : begin + len(expected)]
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", only(["llama", "gemma2", "bloom"], MODELS))
def test_generation_equals_solo(name, use_cache):
    model, prompted = attached(name)
    ids, mask = padded(ROWS, "left")
    out = prompted.generate(
        input_ids=ids, attention_mask=mask, adapter_names=NAMES,
        max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache,
    )  # fmt: skip
    for i, row in enumerate(ROWS):
        whole = placed(model, prompted, NAMES[i], row, AT[i])
        for token in out[i, ids.shape[1] :].tolist():
            with torch.no_grad():
                logits = model(inputs_embeds=whole).logits[0, -1]
            logits[2] = -torch.inf  # min_new_tokens
            assert int(logits.argmax()) == token
            step = input_embedding(model)(torch.tensor([[token]]))
            whole = torch.cat([whole, step], dim=1)


def test_the_caller_may_say_where():
    model, prompted = attached("llama")
    row = torch.tensor([ROWS[0]])
    with torch.no_grad():
        got = prompted(input_ids=row, prompt_at=4).logits[0]
        expected = model(inputs_embeds=placed(model, prompted, "bos", ROWS[0], 4)).logits[0]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    ids, mask = padded(ROWS, "right")
    with torch.no_grad():
        both = prompted(input_ids=ids, attention_mask=mask, prompt_at=torch.tensor([4, 0, 1, 2]))
    torch.testing.assert_close(both.logits[0, :13], expected, atol=2e-5, rtol=1e-5)


def test_labels_and_gradients_follow():
    model, prompted = attached("llama")
    ids, mask = padded(ROWS[:2], "right")
    labels = ids.masked_fill(mask == 0, -100)
    loss = prompted(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    gradient = prompted.prompt_encoder["bos"].embedding.weight.grad.clone()
    prompted.zero_grad()
    total = torch.zeros(())
    for row in ROWS[:2]:
        text = input_embedding(model)(torch.tensor(row))
        rows = prompted.prompt_encoder["bos"].embedding.weight
        logits = model(inputs_embeds=torch.cat([text[:1], rows, text[1:]])[None]).logits[0]
        # The token behind BOS is predicted by the prompt's last row.
        predictors = logits[torch.tensor([4 + t - 1 for t in range(1, len(row))])]
        total = total + torch.nn.functional.cross_entropy(predictors, torch.tensor(row[1:]), reduction="sum")
    expected = total / sum(len(row) - 1 for row in ROWS[:2])
    torch.testing.assert_close(loss, expected)
    (own,) = torch.autograd.grad(expected, prompted.prompt_encoder["bos"].embedding.weight)
    torch.testing.assert_close(gradient, own, atol=1e-6, rtol=1e-5)


def answered(ids, mask, answers):
    """Return labels ``[B, T]`` for the last tokens of each row."""
    labels = torch.full_like(ids, -100)
    for i, count in enumerate(answers):
        columns = mask[i].nonzero()[-count:, 0]
        labels[i, columns] = ids[i, columns]
    return labels


@pytest.mark.parametrize("side", only(["left"], ["left", "right"]))
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_suffix_stands_between_input_and_answer(name, side):
    model, prompted = attached(name)
    prompted.set_adapter("suffix")
    answers, names = [3, 1, 2, 2], ["suffix", "suffix", "suffix", "__base__"]
    ids, mask = padded(ROWS, side)
    call = {"input_ids": ids, "attention_mask": mask, "labels": answered(ids, mask, answers)}
    loss = prompted(**call, adapter_names=names).loss
    loss.backward()
    rows = prompted.prompt_encoder["suffix"].embedding.weight
    total = torch.zeros(())
    for row, count, chosen in zip(ROWS, answers, names, strict=True):
        text = input_embedding(model)(torch.tensor(row))
        own = rows if chosen == "suffix" else rows[:0]
        whole = torch.cat([text[:-count], own, text[-count:]])[None]
        logits = model(inputs_embeds=whole).logits[0, -count - 1 : -1]
        target = torch.tensor(row[-count:])
        total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(loss, total / sum(answers))
    (gradient,) = torch.autograd.grad(total / sum(answers), rows)
    assert gradient.abs().sum() > 0.01
    torch.testing.assert_close(rows.grad, gradient, atol=1e-6, rtol=1e-5)


def test_a_suffix_needs_an_input_before_the_answer():
    _, prompted = attached("llama")
    prompted.set_adapter("suffix")
    row = torch.tensor([ROWS[0]])
    with pytest.raises(ConfigError, match=r"row 0 begins with a label; .* give prompt_at"):
        prompted(input_ids=row, labels=row)
    assert prompted(input_ids=row, labels=row, prompt_at=5).loss.isfinite()


@pytest.mark.parametrize("side", only(["left"], ["left", "right"]))
@pytest.mark.parametrize("at", [0, 1, 2])
def test_labels_of_padded_rows_are_those_of_rows_alone(side, at):
    _, prompted = attached("bloom")
    ids, mask = padded(ROWS, side)
    labels = ids.masked_fill(mask == 0, -100)
    names = ["suffix", "bos", "suffix", "__base__"]
    call = {"adapter_names": names, "prompt_at": at}
    loss = prompted(input_ids=ids, attention_mask=mask, labels=labels, **call).loss
    total, count = 0.0, 0
    for row, name in zip(ROWS, names, strict=True):
        own = torch.tensor([row])
        alone = prompted(input_ids=own, labels=own, adapter_names=[name], prompt_at=at).loss
        scored = len(row) - (0 if at == 0 and name != "__base__" else 1)
        total, count = total + alone * scored, count + scored
    torch.testing.assert_close(loss, total / count)


def test_an_offset_that_no_prompt_has_is_refused():
    prefixed = get_peft_model(causal("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match=r"prompt_at would be ignored: .* tokens of each layer"):
        prefixed(input_ids=torch.tensor([ROWS[0]]), prompt_at=3)
    t5 = build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ["t5"]())
    decoder = config("SEQ_2_SEQ_LM", "prefix", output_model_types=["DECODER"])
    prompted = get_peft_model(t5, decoder)
    call = {"input_ids": torch.tensor([[5, 6, 7]]), "prompt_at": 2}
    with pytest.raises(ConfigError, match=r"prompt_at would be ignored: .* the decoder's input"):
        prompted(**call, labels=torch.tensor([[8]]))
    with pytest.raises(ConfigError, match="prompt_at would be ignored"):
        prompted.generate(**call, max_new_tokens=2)
    call["prompt_at"] = 0
    assert prompted(**call, labels=torch.tensor([[8]])).loss.isfinite()


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("placement", ["after_bos", "suffix"])
def test_classifiers_pool_the_first_token_of_the_row(name, placement):
    model = build(tf.AutoModelForSequenceClassification, ENCODERS[name](), num_labels=3)
    prompted = get_peft_model(model, config("SEQ_CLS", placement))
    ids, mask = padded([[5, 6, 7, 8, 9], [7, 8, 9]], "right", pad=model.config.pad_token_id)
    with torch.no_grad():
        batch = prompted(input_ids=ids, attention_mask=mask).logits
        for i, row in enumerate([[5, 6, 7, 8, 9], [7, 8, 9]]):
            alone = prompted(input_ids=torch.tensor([row])).logits[0]
            torch.testing.assert_close(batch[i], alone, atol=2e-5, rtol=1e-5)
    if name == "bert":
        at = 1 if placement == "after_bos" else 5
        table = input_embedding(model)(ids[0])
        rows = prompted.prompt_encoder["default"].materialize().detach()
        whole = torch.cat([table[:at], rows, table[at:]]).unsqueeze(0)
        with torch.no_grad():
            states = model.bert(inputs_embeds=whole)
            head = prompted.base_model.classifier.modules_to_save["default"]
            torch.testing.assert_close(batch[0], head(states.pooler_output)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_inputs(name):
    model = build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ[name]())
    prompted = get_peft_model(model, config("SEQ_2_SEQ_LM", "suffix"))
    rows = [[5, 6, 7, 8], [9, 10]]
    ids, mask = padded(rows, "right", pad=model.config.pad_token_id)
    labels = torch.tensor([[11, 12], [13, 14]])
    with torch.no_grad():
        batch = prompted(input_ids=ids, attention_mask=mask, labels=labels).logits
        for i, row in enumerate(rows):
            whole = placed(model, prompted, "default", row, len(row))
            alone = model(inputs_embeds=whole, labels=labels[i : i + 1]).logits[0]
            torch.testing.assert_close(batch[i], alone, atol=2e-5, rtol=1e-5)


def test_it_is_kept_in_the_artifact_and_refused_by_peft(tmp_path):
    model, prompted = attached("llama")
    row = torch.tensor([ROWS[0]])
    expected = prompted(input_ids=row).logits
    prompted.save_pretrained(tmp_path, selected_adapters=["bos"])
    again = PeftModel.from_pretrained(causal("llama"), tmp_path / "bos")
    assert again.active_peft_config.placement == "after_bos"
    assert torch.equal(again(input_ids=row).logits, expected)
    peft = pytest.importorskip("peft")
    with pytest.raises(KeyError, match="EXTENDED_PROMPT_TUNING"):
        peft.PeftModel.from_pretrained(causal("llama"), tmp_path / "bos")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"prompt_at": 1.5}, ConfigError, "prompt_at must be one integer"),
        ({"prompt_at": [1, 2]}, ConfigError, "one for each of the 1 rows"),
        ({"prompt_at": 10}, DataError, "10"),
        ({"prompt_at": -1}, ConfigError, "-1"),
    ],
)
def test_offsets_that_are_none_are_refused(call, error, message):
    _, prompted = attached("llama")
    with pytest.raises(error, match=message) as caught:
        prompted(input_ids=torch.tensor([ROWS[0]]), **call)
    assert "\n" not in str(caught.value)


def test_what_a_base_cannot_have_is_refused():
    t5 = build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ["t5"](), bos_token_id=None)
    with pytest.raises(BackboneError, match="no token that starts every text"):
        get_peft_model(t5, config("SEQ_2_SEQ_LM", "after_bos"))
    with pytest.raises(ConfigError, match="placement prefix"):
        get_peft_model(t5, config("SEQ_2_SEQ_LM", "suffix", prompt_sees_input=False))
    model = get_peft_model(causal("llama"), config("CAUSAL_LM", "chat_system"))
    with pytest.raises(ConfigError, match="needs prompt_at"):
        model(input_ids=torch.tensor([ROWS[0]]))
    with pytest.raises(ConfigError, match="prefill_chunk_size needs placement prefix"):
        model.generate(torch.tensor([ROWS[0]]), prompt_at=2, prefill_chunk_size=2)
    with pytest.raises(ConfigError, match="placement must be one of prefix, after_bos"):
        config("CAUSAL_LM", "sufix")


def test_every_architecture_is_known():
    assert set(MODELS) <= set(CAUSAL)
