"""Prefix tuning past PEFT: any row of any batch is the row alone, checkpointing changes nothing, text starts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf

import softprompt
from oracles.caches import CACHE
from oracles.checkpointing import recompute
from oracles.families import CAUSAL, ENCODERS, SHARING, build, causal, seq2seq, sharing
from oracles.naive import padded
from oracles.prefixed import solo_decoder_logits, solo_greedy_behind, solo_logits_behind
from oracles.slow import only
from oracles.tokenizers import byte_bpe
from softprompt import PrefixTuningConfig, get_peft_model
from softprompt.errors import BackboneError, ConfigError, ContextOverflowError

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33, 34], [5, 6, 7]]
NAMES = ["default", "long", "__base__", "long"]
INSIDE = ["llama", "gpt2", "qwen2", "mistral", "gemma2", "gpt_neox", "opt"]


def prefixed(model, task="CAUSAL_LM", **options):
    """Return a model with a prefix of 4 and one of 11, longer than the tiny sliding windows."""
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=4, **options)
    attached = get_peft_model(model, config)
    attached.add_adapter("long", PrefixTuningConfig(task_type=task, num_virtual_tokens=11))
    return attached.eval()


def value(model, name):
    return None if name == "__base__" else model.encoder_of(name).materialize().detach()


@pytest.mark.parametrize("name", only(["gpt2", "gemma2", "bloom"], [*INSIDE, "bloom", "gptj", "falcon"]))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_batch_is_the_row_alone(name, side):
    model = prefixed(causal(name))
    ids, mask = padded(ROWS, side)
    logits = model(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
    assert logits.shape[:2] == ids.shape
    for row, adapter, real, got in zip(ROWS, NAMES, mask.bool(), logits, strict=True):
        expected = solo_logits_behind(model.base_model, value(model, adapter), row)
        torch.testing.assert_close(got[real], expected, **CLOSE)


@pytest.mark.parametrize("name", only(["gemma4"], SHARING))
@pytest.mark.parametrize("side", only(["left"], ["left", "right"]))
@pytest.mark.filterwarnings("ignore:Prefix tuning injected")
def test_rows_where_layers_share_or_differ(name, side):
    model = prefixed(sharing(name))
    ids, mask = padded(ROWS, side)
    logits = model(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
    model.generation_config.eos_token_id = None
    options = {"adapter_names": NAMES, "max_new_tokens": 9, "do_sample": False}
    made = model.generate(input_ids=ids, attention_mask=mask, **options)
    for i, row in enumerate(ROWS):
        one = torch.tensor([row])
        alone = model(input_ids=one, adapter_names=NAMES[i : i + 1]).logits[0]
        torch.testing.assert_close(logits[i][mask[i].bool()], alone, **CLOSE)
        if side == "left":  # each new token is the likeliest behind those before it, all run in one pass
            whole = torch.cat([one, made[i : i + 1, ids.shape[1] :]], 1)
            passed = model(input_ids=whole, adapter_names=NAMES[i : i + 1]).logits[0]
            assert whole[0, len(row) :].tolist() == passed[len(row) - 1 : -1].argmax(-1).tolist()


def test_a_text_start_stands_in_the_layers_that_keep_their_own(tmp_path):
    byte_bpe().save_pretrained(tmp_path)
    sizes = {"vocab_size": 300, "vocab_size_per_layer_input": 300}
    model = build(tf.AutoModelForCausalLM, SHARING["gemma4"](), **sizes)
    ids = byte_bpe()("one two three")["input_ids"][:4]
    options = {"prefix_tuning_init_text": "one two three", "tokenizer_name_or_path": str(tmp_path)}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    ours = get_peft_model(copy.deepcopy(model), config).eval()
    with pytest.warns(UserWarning, match=r"injected into layers \[0, 1\]; skipped \[2, 3\] due to KV shape"):
        got = ours(input_ids=torch.tensor([ROWS[1]])).logits[0]
    expected = model(input_ids=torch.tensor([[*ids, *ROWS[1]]])).logits[0, 4:]
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_prefix_that_fits_no_layer_is_refused():
    model = prefixed(sharing("gemma4"))
    model.base_model.config.num_key_value_heads = 99
    with pytest.raises(BackboneError, match="skipped every layer because no layer's KV shape matched"):
        model(input_ids=torch.tensor([ROWS[1]]))


@pytest.mark.parametrize("name", only(["gemma2", "bloom"], [*INSIDE, "bloom", "gptj"]))
def test_generation_from_a_mixed_batch_is_that_of_each_row(name):
    model = prefixed(causal(name))
    model.generation_config.eos_token_id = None
    ids, mask = padded(ROWS, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6}
    out = model.generate(**inputs, adapter_names=NAMES, do_sample=False)
    for row, adapter, got in zip(ROWS, NAMES, out, strict=True):
        expected = solo_greedy_behind(model.base_model, value(model, adapter), row, 6)
        assert got[ids.shape[1] :].tolist() == expected
    beams = model.generate(**inputs, adapter_names=NAMES, num_beams=3, do_sample=False)
    for i, (row, adapter) in enumerate(zip(ROWS, NAMES, strict=True)):
        alone = model.generate(
            input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=6, num_beams=3, do_sample=False, adapter_names=[adapter],
        )  # fmt: skip
        assert beams[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
def test_models_that_count_columns_refuse_padding_behind_the_prefix(name):
    model = prefixed(causal(name))
    ids, mask = padded(ROWS, "right")
    logits = model(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
    for row, adapter, got in zip(ROWS, NAMES, logits, strict=True):
        expected = solo_logits_behind(model.base_model, value(model, adapter), row)
        torch.testing.assert_close(got[: len(row)], expected, **CLOSE)
    ids, mask = padded(ROWS, "left")
    with pytest.raises(ConfigError, match="counts columns"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_rows(name):
    model = prefixed(seq2seq(name), "SEQ_2_SEQ_LM")
    ids, mask = padded(ROWS, "right")
    answers = [[0, 5, 6, 7], [0, 8], [0, 9, 10], [0, 11, 12, 13]]
    decoder_ids, decoder_mask = padded(answers, "right")
    logits = model(
        input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids,
        decoder_attention_mask=decoder_mask, adapter_names=NAMES,
    ).logits  # fmt: skip
    for row, answer, adapter, got in zip(ROWS, answers, NAMES, logits, strict=True):
        prefix = value(model, adapter)
        expected = solo_decoder_logits(model.base_model, prefix, row, answer)
        torch.testing.assert_close(got[: len(answer)], expected, **CLOSE)
    out = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, max_new_tokens=5, num_beams=2)
    for i, (row, adapter) in enumerate(zip(ROWS, NAMES, strict=True)):
        alone = model.generate(
            input_ids=torch.tensor([row]), adapter_names=[adapter], max_new_tokens=5, num_beams=2
        )
        length = alone.shape[1]
        assert out[i, :length].tolist() == alone[0].tolist()


@pytest.mark.parametrize("name", only(["gpt2", "t5"], ["llama", "gpt2", "mistral", "t5", "bart"]))
@pytest.mark.parametrize("reentrant", only([False], [True, False]))
@pytest.mark.parametrize("projected", only([True], [True, False]))
def test_checkpointing_changes_nothing(name, reentrant, projected):
    inside = name in INSIDE
    model = prefixed(
        causal(name) if inside else seq2seq(name, dropout_rate=0.0, dropout=0.0),
        "CAUSAL_LM" if inside else "SEQ_2_SEQ_LM", prefix_projection=projected,
    )  # fmt: skip
    ids, mask = padded(ROWS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            options = {"use_reentrant": reentrant}
            recompute(model.base_model, options)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), trained))
    torch.testing.assert_close(results[0], results[1], **CLOSE)
    assert len(results[0][1]) == (5 if projected else 1)


def test_continuing_from_a_cache():
    model = prefixed(causal("llama"))
    ids = torch.tensor([ROWS[0]])
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :6], use_cache=True)
    rest = model(
        input_ids=ids[:, 6:],
        **{CACHE: first[CACHE]},
        attention_mask=torch.ones_like(ids),
    )
    torch.testing.assert_close(rest.logits, whole[:, 6:], **CLOSE)
    started = model.generate(input_ids=ids[:, :6], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert started[CACHE].get_seq_length() == started.sequences.shape[1] - 1
    more = {"max_new_tokens": 3, "do_sample": False}
    again = model.generate(started.sequences, **{CACHE: started[CACHE]}, **more)
    assert again.tolist() == model.generate(started.sequences, **more).tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gptj", "t5"])
def test_the_base_is_untouched(name):
    base = seq2seq(name) if name == "t5" else causal(name)
    ids = torch.tensor([ROWS[0]])
    extra = {"decoder_input_ids": ids} if name == "t5" else {}
    before = base(input_ids=ids, **extra).logits
    tokens = base.generate(ids, max_new_tokens=5, do_sample=False)
    implementation = base.config._attn_implementation
    model = prefixed(base, "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM")
    assert not torch.equal(model(input_ids=ids, **extra).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids, **extra).logits, before)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)
    assert torch.equal(base(input_ids=ids, **extra).logits, before)
    assert base.config._attn_implementation == implementation
    unloaded = model.detach()
    assert torch.equal(unloaded(input_ids=ids, **extra).logits, before)
    assert not [m for m in unloaded.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("name", only(["llama", "bloom"], ["llama", "mistral", "gpt2", "bloom", "gptj"]))
def test_a_text_start_is_the_text_in_front(name, tmp_path):
    """The exact oracle: logits behind the prefix are those behind the text's own tokens."""
    tokenizer = byte_bpe(bos=True)
    tokenizer.save_pretrained(tmp_path)
    base = causal(name, vocab_size=400)
    text = tokenizer("the parcel is late")["input_ids"]
    options = {
        "prefix_tuning_init_text": "the parcel is late",
        "tokenizer_name_or_path": str(tmp_path),
    }
    for length in (len(text), len(text) - 2, 2 * len(text)):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **options)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        front = (text * 2)[:length]
        got = model(input_ids=torch.tensor([ROWS[0]])).logits
        expected = base(input_ids=torch.tensor([front + ROWS[0]])).logits[:, length:]
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_frozen_first_token_stays(tmp_path):
    byte_bpe(bos=True).save_pretrained(tmp_path / "tokenizer")
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, freeze_first_token=True,
        prefix_tuning_init_text="thank you", tokenizer_name_or_path=str(tmp_path / "tokenizer"),
    )  # fmt: skip
    base = causal("llama", vocab_size=400)
    model = get_peft_model(copy.deepcopy(base), config)
    before = model.encoder_of("default").materialize().detach().clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(input_ids=torch.tensor([ROWS[0]]), labels=torch.tensor([ROWS[0]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.encoder_of("default").materialize().detach()
    assert torch.equal(after[..., 0, :], before[..., 0, :])
    assert not torch.equal(after[..., 1:, :], before[..., 1:, :])
    model.save_pretrained(tmp_path / "out")
    loaded = softprompt.PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(loaded.encoder_of("default").materialize(), after)


def test_heads_on_decoders_and_encoders_batched():
    for base in (
        build(tf.AutoModelForSequenceClassification, CAUSAL["llama"](), num_labels=3),
        build(tf.AutoModelForSequenceClassification, ENCODERS["bert"](), num_labels=3),
        build(tf.AutoModelForSequenceClassification, ENCODERS["roberta"](), num_labels=3),
    ):
        model = prefixed(base, "SEQ_CLS")
        pad = base.config.pad_token_id
        ids, mask = padded(ROWS, "right", pad)
        names = ["default", "long", "default", "long"]
        got = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
        for row, adapter, logits in zip(ROWS, names, got, strict=True):
            alone = model(input_ids=torch.tensor([row]), adapter_names=[adapter]).logits[0]
            torch.testing.assert_close(logits, alone, **CLOSE)


def test_half_precision_copies_and_pickles():
    model = prefixed(causal("llama").to(torch.bfloat16))
    ids = torch.tensor([ROWS[0]])
    expected = model(input_ids=ids).logits
    assert expected.dtype == torch.bfloat16
    assert model.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
    for copied in (copy.deepcopy(model), pickled):
        assert torch.equal(copied(input_ids=ids).logits, expected)


def test_eager_attention():
    sdpa, eager = (prefixed(causal("llama")) for _ in range(2))
    eager.base_model.set_attn_implementation("eager")
    ids, mask = padded(ROWS, "left")
    a, b = (m(input_ids=ids, attention_mask=mask, adapter_names=NAMES) for m in (sdpa, eager))
    torch.testing.assert_close(a.logits[mask.bool()], b.logits[mask.bool()], **CLOSE)
    weights = eager(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert weights[0].shape == (4, 4, 10, 4 + 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_weights": "zeros"}, "init_weights must be"),
        ({"encoder_hidden_size": 0, "prefix_projection": True}, "at least 1; got 0"),
        ({"prefix_tuning_init_text": "a"}, "needs tokenizer_name_or_path"),
        ({"tokenizer_name_or_path": "a"}, "would be ignored without prefix_tuning_init_text"),
        ({"freeze_first_token": True}, "would be ignored without prefix_tuning_init_text"),
        ({"prefix_tuning_init_text": "a", "tokenizer_name_or_path": "b", "prefix_projection": True},
         "does not go with"),
        ({"prefix_tuning_init_text": "a", "tokenizer_name_or_path": "b", "init_weights": "zero"},
         "does not go with"),
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored(options, message):
    with pytest.raises(ConfigError, match=message):
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)


def test_a_width_without_a_projection_is_taken_as_pefts_and_refused_where_tune_asks():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    with pytest.raises(ConfigError, match="would be ignored without prefix_projection"):
        config.refuse_ignored()


def test_what_does_not_fit_the_model():
    model = prefixed(causal("gpt2"))
    ids = torch.tensor([ROWS[0]])
    for options, message in (
        ({"num_layers": 3}, "num_layers is 3"),
        ({"token_dim": 8}, "token_dim is 8"),
    ):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
        with pytest.raises(ConfigError, match=message):
            model.add_adapter("other", config)
    rows = softprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ConfigError, match="all prompts on one model are prefixes or none is"):
        model.add_adapter("other", rows)
    with pytest.raises(ContextOverflowError, match="4 virtual tokens"):
        model(input_ids=torch.full((1, 62), 5))
    with pytest.raises(ContextOverflowError, match="new tokens exceed"):
        model.generate(ids, max_new_tokens=60)
    with pytest.raises(ConfigError, match="attention_mask must be"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 10, 10))
    with pytest.raises(ConfigError, match="position_ids start again"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]))
    with pytest.raises(ConfigError, match="static cache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ConfigError, match="assistant_early_exit does not work"):
        model.generate(ids, max_new_tokens=2, assistant_early_exit=1)


@pytest.mark.parametrize(
    ("config", "loader"),
    [
        (lambda: tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
         tf.AutoModelForCausalLM),
        (ENCODERS["albert"], tf.AutoModelForSequenceClassification),
        (ENCODERS["distilbert"], tf.AutoModelForSequenceClassification),
    ],
)  # fmt: skip
def test_models_no_prefix_can_stand_in(config, loader):
    model = build(loader, config())
    # Whether layers keep keys and values shows when a prefix is attached, whether they read them in a pass.
    with pytest.raises(BackboneError, match="use PromptTuningConfig"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4))(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("name", only(["mpt"], ["mpt", "bloom", "gptj"]))
def test_generation_without_a_cache_of_its_own(name):
    """MPT asks for no cache by default: each step feeds the whole text, behind the prefix once."""
    model = prefixed(causal(name))
    model.generation_config.eos_token_id = None
    row = torch.tensor([ROWS[1]])
    got = model.generate(input_ids=row, max_new_tokens=20, do_sample=False, use_cache=False)
    expected = solo_greedy_behind(model.base_model, value(model, "default"), ROWS[1], 20)
    assert got[0, 3:].tolist() == expected
