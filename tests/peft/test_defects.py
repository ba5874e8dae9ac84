"""Each defect seen in PEFT's prompt tuning, right here. One test a defect."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from oracles.caches import CACHE
from oracles.families import ENCODERS, build, causal, seq2seq
from oracles.naive import padded, solo_greedy, solo_logits
from oracles.peft_pair import base, batch
from oracles.slow import only
from softprompt import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from softprompt.errors import (
    AdapterError,
    ArtifactError,
    ConfigError,
    ContextOverflowError,
    FingerprintError,
)

P = 5
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def prompted(model, task, **config):
    return get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=P, **config)).eval()


def rows_of(model):
    return model.prompt_encoder["default"].materialize()


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "qwen2", "mistral", "gemma3"])
def test_left_padded_row_equals_the_row_alone(name):
    model = causal(name)
    ours = prompted(model, "CAUSAL_LM")
    ids, mask = padded([[5, 6, 7, 8, 9, 10], [11, 12]], "left")
    logits = ours(input_ids=ids, attention_mask=mask).logits[1, -2:]
    torch.testing.assert_close(logits, solo_logits(model, rows_of(ours), torch.tensor([11, 12])), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoder_classifier_pools_the_last_real_token(name, side):
    from oracles.families import CAUSAL

    model = build(tf.AutoModelForSequenceClassification, CAUSAL[name](), num_labels=3)
    ours = prompted(model, "SEQ_CLS")
    ids, mask = padded([[5, 6, 7, 8, 9, 10], [11, 12, 13]], side)
    logits = ours(input_ids=ids, attention_mask=mask).logits
    for i, row in enumerate([[5, 6, 7, 8, 9, 10], [11, 12, 13]]):
        solo = ours(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[i], solo, **CLOSE)


def test_answer_positions_move_behind_the_prompt():
    ours = prompted(base("QUESTION_ANS"), "QUESTION_ANS")
    ids = torch.randint(3, 64, (2, 9))
    start, end = torch.tensor([2, 4]), torch.tensor([3, 8])
    out = ours(input_ids=ids, start_positions=start, end_positions=end)
    expected = (
        torch.nn.functional.cross_entropy(out.start_logits, start + P)
        + torch.nn.functional.cross_entropy(out.end_logits, end + P)
    ) / 2
    torch.testing.assert_close(out.loss, expected)


def test_token_labels_cover_the_text_alone():
    ours = prompted(base("TOKEN_CLS"), "TOKEN_CLS")
    ids, labels = torch.randint(3, 64, (2, 9)), torch.randint(0, 3, (2, 9))
    out = ours(input_ids=ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, P:].reshape(-1, 3), labels.reshape(-1))
    torch.testing.assert_close(out.loss, expected)


def test_token_type_ids_are_kept():
    model = base("FEATURE_EXTRACTION")
    ours = prompted(model, "FEATURE_EXTRACTION")
    ids, types = torch.randint(3, 64, (1, 6)), torch.tensor([[0, 0, 0, 1, 1, 1]])
    embeds = model.get_input_embeddings()(ids)
    expected = model(
        inputs_embeds=torch.cat([rows_of(ours)[None], embeds], 1),
        token_type_ids=torch.cat([torch.zeros(1, P, dtype=torch.long), types], 1),
    ).last_hidden_state
    torch.testing.assert_close(ours(input_ids=ids, token_type_ids=types).last_hidden_state, expected, **CLOSE)


def test_position_ids_are_kept():
    model = causal("gpt2")
    ours = prompted(model, "CAUSAL_LM")
    ids, positions = torch.randint(3, 64, (1, 4)), torch.tensor([[0, 1, 5, 6]])
    embeds = torch.cat([rows_of(ours)[None], model.get_input_embeddings()(ids)], 1)
    expected = model(inputs_embeds=embeds, position_ids=torch.cat([torch.arange(P)[None], positions + P], 1)).logits
    torch.testing.assert_close(ours(input_ids=ids, position_ids=positions).logits, expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_packed_sequences_do_not_see_each_other(name):
    model = causal(name)
    ours = prompted(model, "CAUSAL_LM")
    first, second = [5, 6, 7, 8], [9, 10, 11]
    packed = torch.tensor([first + second])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    logits = ours(input_ids=packed, position_ids=positions).logits[0, P:]
    for row, where in ((first, slice(0, 4)), (second, slice(4, 7))):
        solo = solo_logits(model, rows_of(ours), torch.tensor(row))
        torch.testing.assert_close(logits[where], solo, **CLOSE)


def test_seq2seq_has_no_dead_rows():
    ours = prompted(seq2seq("t5"), "SEQ_2_SEQ_LM")
    ours(**batch("SEQ_2_SEQ_LM")).loss.backward()
    gradient = ours.prompt_encoder["default"].embedding.weight.grad
    assert gradient.shape == (P, 32)
    assert (gradient.abs().sum(1) > 0).all()
    both = prompted(seq2seq("t5"), "SEQ_2_SEQ_LM", num_transformer_submodules=2)
    assert both.prompt_encoder["default"].embedding.weight.shape == (P, 32)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_disable_adapter_reaches_generate(task):
    model = base(task)
    ids = torch.randint(3, 64, (2, 6))
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
    }
    expected = model.generate(**options)
    ours = prompted(model, task)
    with_prompt = ours.generate(**options)
    with ours.disable_adapter():
        assert ours.generate(**options).tolist() == expected.tolist()
    assert ours.generate(**options).tolist() == with_prompt.tolist() != expected.tolist()


@pytest.mark.parametrize("ids", ["0", True, [True, False], [[0, 1]], [0.0, 1.0], object()])
def test_task_ids_are_integers(ids):
    kind = MultitaskPromptTuningConfig
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "num_tasks": 2}
    model = get_peft_model(causal("llama"), kind(**options))
    plain = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model.add_adapter("plain", plain)
    tokens = torch.tensor([[5, 6], [7, 8]])
    with pytest.raises(ConfigError, match="task_ids must be one integer, or one for each of the 2"):
        model(tokens, task_ids=ids)
    for other in ("plain", "__base__"):
        names = ["default", other]
        with pytest.raises(ConfigError, match="task_ids of rows without tasks are 0"):
            model(tokens, adapter_names=names, task_ids=[1, 1])
        model(tokens, adapter_names=names, task_ids=[1, 0])


def test_disabled_a_multitask_prompt_needs_no_task_ids():
    model = causal("llama")
    ids = torch.randint(3, 64, (2, 6))
    expected, text = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=3)
    ours = get_peft_model(model, config).eval()
    with ours.disable_adapter():
        assert torch.equal(ours(ids).logits, expected)
        assert torch.equal(ours(ids, task_ids=[0, 2]).logits, expected)
        assert torch.equal(ours.generate(ids, max_new_tokens=3, do_sample=False), text)
        with pytest.raises(AdapterError):
            ours(ids, adapter_names=["default", "typo"])
    with pytest.raises(ConfigError, match="task_ids"):
        ours(ids)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_seq2seq_rows_equal_alone(name, side):
    ours = prompted(seq2seq(name), "SEQ_2_SEQ_LM")
    ours.add_adapter("b", PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2))
    rows, names = [[5, 6, 7, 8, 9, 2], [11, 12, 2], [30, 31, 32, 2]], ["default", "b", "__base__"]
    ids, mask = padded(rows, side)
    labels = torch.randint(3, 64, (3, 4))
    logits = ours(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=names).logits
    tokens = ours.generate(
        input_ids=ids,
        attention_mask=mask,
        adapter_names=names,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
    )
    for i, row in enumerate(rows):
        one = {"input_ids": torch.tensor([row]), "adapter_names": [names[i]]}
        torch.testing.assert_close(logits[i], ours(**one, labels=labels[i : i + 1]).logits[0], **CLOSE)
        alone = ours.generate(**one, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert tokens[i].tolist() == alone[0].tolist()


def test_forward_continues_from_its_cache():
    model = causal("llama")
    ours = prompted(model, "CAUSAL_LM")
    ids, mask = padded([[5, 6, 7, 8, 9, 10], [11, 12, 13]], "left")
    expected = ours(input_ids=ids, attention_mask=mask).logits[:, P:]
    first = ours(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    second = ours(input_ids=ids[:, 4:], attention_mask=mask, **{CACHE: first[CACHE]})
    torch.testing.assert_close(second.logits, expected[:, 4:], **CLOSE)
    with pytest.raises(ConfigError, match="8 columns"):
        ours(input_ids=ids[:, 4:], attention_mask=mask[:, 1:4], **{CACHE: first[CACHE]})


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 2}])
def test_generate_paths_lose_no_token(options):
    model = causal("llama")
    ours = prompted(model, "CAUSAL_LM")
    row = torch.tensor([5, 6, 7, 8, 9])
    out = ours.generate(input_ids=row[None], max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
    if "num_beams" in options:
        assert out.shape == (1, 11)
    else:
        assert out[0, 5:].tolist() == solo_greedy(model, rows_of(ours), row, 6)


def test_generate_with_a_static_cache():
    ours = prompted(causal("llama"), "CAUSAL_LM")
    ids, mask = padded([[5, 6, 7, 8], [9, 10]], "left")
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = ours.generate(**options)
    static = ours.generate(**options, cache_implementation="static", disable_compile=True)
    assert static.tolist() == expected.tolist()


def test_generate_continues_from_a_returned_cache():
    ours = prompted(causal("llama"), "CAUSAL_LM")
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    first = ours.generate(input_ids=ids, max_new_tokens=3, **options)
    longer = torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], 1)
    cache = copy.deepcopy(first[CACHE])
    continued = ours.generate(input_ids=longer, **{CACHE: cache}, max_new_tokens=4, **options)
    fresh = ours.generate(input_ids=longer, max_new_tokens=4, **options)
    assert continued.sequences.tolist() == fresh.sequences.tolist()


def test_generate_from_embeddings():
    ours = prompted(causal("llama"), "CAUSAL_LM")
    ids, mask = padded([[5, 6, 7, 8], [9, 10]], "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = ours.generate(input_ids=ids, **options)[:, 4:]
    embeds = ours.base_model.get_input_embeddings()(ids)
    assert ours.generate(inputs_embeds=embeds, **options).tolist() == expected.tolist()


def test_generate_takes_positional_ids_for_seq2seq():
    ours = prompted(seq2seq("t5"), "SEQ_2_SEQ_LM")
    ids = torch.tensor([[5, 6, 7, 2]])
    named = ours.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert ours.generate(ids, max_new_tokens=5, do_sample=False).tolist() == named.tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", only(["gemma3", "bloom"], ["llama", "gpt2", "gemma3", "mistral", "bloom"]))
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_drafts_change_no_greedy_token(name, kind):
    """Prompt lookup and an assistant, which has no prompt, draft tokens that are checked behind the prompt."""
    model = get_peft_model(causal(name), kind(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    passes = []
    hook = model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    plain = model.generate(input_ids=ids, **options)
    count = len(passes)
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": causal(name)}):
        passes.clear()
        assert torch.equal(model.generate(input_ids=ids, **options, **draft), plain)
        assert 0 < len(passes) <= count
    hook.remove()


def test_drafts_are_refused_where_they_would_be_wrong():
    ours = prompted(seq2seq("t5"), "SEQ_2_SEQ_LM")
    with pytest.raises(ConfigError, match="prompt_lookup_num_tokens does not work with soft prompts on T5"):
        ours.generate(input_ids=torch.tensor([[5, 6]]), prompt_lookup_num_tokens=2, max_new_tokens=4)
    with pytest.raises(ConfigError, match="assistant_early_exit"):
        prompted(causal("llama"), "CAUSAL_LM").generate(input_ids=torch.tensor([[5, 6]]), assistant_early_exit=1)


def test_a_prompt_for_another_base_is_refused(tmp_path):
    prompted(causal("llama"), "CAUSAL_LM").save_pretrained(tmp_path)
    other = causal("llama", seed=9)
    with pytest.raises(FingerprintError, match="was made for"):
        PeftModel.from_pretrained(other, tmp_path)
    PeftModel.from_pretrained(other, tmp_path, ignore_fingerprint=True)
    PeftModel.from_pretrained(causal("llama").to(torch.bfloat16), tmp_path)


def test_loaded_prompts_are_frozen_unless_asked(tmp_path):
    ours = prompted(causal("llama"), "CAUSAL_LM")
    ours.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(causal("llama"), tmp_path)
    assert frozen.get_nb_trainable_parameters()[0] == 0
    further = PeftModel.from_pretrained(causal("llama"), tmp_path, is_trainable=True)
    assert further.get_nb_trainable_parameters()[0] == P * 32
    further(**batch("CAUSAL_LM")).loss.backward()
    assert further.prompt_encoder["default"].embedding.weight.grad is not None


def test_only_the_active_prompt_trains_and_counts():
    ours = prompted(causal("llama"), "CAUSAL_LM")
    ours.add_adapter("b", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert ours.num_parameters(only_trainable=True) == P * 32
    ours.set_adapter("b")
    assert ours.num_parameters(only_trainable=True) == 2 * 32
    assert not ours.prompt_encoder["default"].embedding.weight.requires_grad


def test_unknown_initialisation_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'RANDOM'"):
        PromptTuningConfig(prompt_tuning_init="RANDM")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_context_overflow_is_refused_with_the_numbers(name):
    ours = get_peft_model(causal(name), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
    with pytest.raises(ContextOverflowError, match=r"50 \+ 20 virtual tokens exceed the model's 64"):
        ours(input_ids=torch.full((1, 50), 5))
    ours(input_ids=torch.full((1, 44), 5))
    with pytest.raises(ContextOverflowError, match=r"40 \+ 20 virtual tokens \+ 5 new tokens"):
        ours.generate(input_ids=torch.full((1, 40), 5), max_new_tokens=5)
    assert ours.generate(input_ids=torch.full((1, 40), 5), max_new_tokens=4, eos_token_id=None).shape[1] == 44


@pytest.mark.parametrize("name", ["electra", "albert"])
def test_narrow_embeddings(name):
    model = build(tf.AutoModelForSequenceClassification, ENCODERS[name](), num_labels=2)
    ours = prompted(model, "SEQ_CLS")
    assert rows_of(ours).shape == (P, 16)
    out = ours(input_ids=torch.randint(3, 64, (2, 6)), labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert ours.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_padded_vocabulary():
    model = causal("llama")
    model.resize_token_embeddings(80)
    model.config.vocab_size = 64
    ours = prompted(model, "CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
    row = torch.tensor([5, 6, 70])
    torch.testing.assert_close(
        ours(input_ids=row[None]).logits[0, P:], solo_logits(model, rows_of(ours), row), **CLOSE
    )


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_rows_equal_alone(name, side):
    model = build(tf.AutoModel, ENCODERS[name]())
    ours = prompted(model, "FEATURE_EXTRACTION")
    ours.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2))
    rows, names = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]], ["default", "b", "__base__"]
    ids, mask = padded(rows, side, pad=model.config.pad_token_id)
    hidden = ours(input_ids=ids, attention_mask=mask, adapter_names=names).last_hidden_state
    for i, row in enumerate(rows):
        solo = ours(input_ids=torch.tensor([row]), adapter_names=[names[i]]).last_hidden_state[0]
        torch.testing.assert_close(hidden[i, P:][mask[i].bool()], solo[-len(row) :], **CLOSE)


def test_raw_errors_are_explained():
    with pytest.raises(ConfigError, match="token_dim is 7"):
        prompted(causal("llama"), "CAUSAL_LM", token_dim=7)
    with pytest.raises(ConfigError, match="num_virtual_tokens is missing"):
        get_peft_model(causal("llama"), PromptTuningConfig(task_type="CAUSAL_LM"))
    ours = get_peft_model(causal("llama"), PromptTuningConfig(num_virtual_tokens=2))
    assert ours.task_type == "CAUSAL_LM"
    with pytest.raises(AdapterError, match=r"Adapter x not found\."):
        ours.set_adapter("x")
    with pytest.raises(AdapterError, match="2 rows, got 1"):
        ours(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default"])
    with pytest.raises(ArtifactError):
        PeftModel.from_pretrained(causal("llama"), "does/not-exist-anywhere/here")


def test_per_layer_embeddings():
    """Gemma 4 looks input ids up in a second table, which has no row for a virtual id."""
    from oracles.families import GQA
    from softprompt.backbone import Base
    from softprompt.engine import choose_engine

    config = tf.Gemma4TextConfig(
        **{**GQA, "num_hidden_layers": 2},
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    )
    model = build(tf.AutoModelForCausalLM, config)
    ours = prompted(model, "CAUSAL_LM")
    ids, mask = padded([[5, 6, 7, 8], [9, 10]], "left")
    logits = ours(input_ids=ids, attention_mask=mask).logits[1, -2:]
    alone = ours(input_ids=torch.tensor([[9, 10]])).logits[0, -2:]
    torch.testing.assert_close(logits, alone, **CLOSE)
    assert ours.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3).shape[1] <= 7
    assert choose_engine(Base(model)).name == "forest"
