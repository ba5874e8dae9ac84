"""Cartridges: PEFT's logits, gradients, files, helpers and composition; what PEFT refuses; starts at a text."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import softprompt
from oracles.caches import CACHE
from oracles.checkpointing import recompute
from oracles.families import CAUSAL, build, causal, seq2seq
from oracles.prefixed import solo_logits_behind
from oracles.slow import only
from oracles.tokenizers import byte_bpe
from softprompt import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.errors import AdapterError, ConfigError, FingerprintError

P = 5
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
CASES = {
    **{name: ("CAUSAL_LM", lambda name=name: causal(name)) for name in (
        "llama", "gpt2", "qwen2", "mistral", "gemma2", "bloom"
    )},
    "t5": ("SEQ_2_SEQ_LM", lambda: seq2seq("t5")),
    "llama-seq": (
        "SEQ_CLS",
        lambda: build(tf.AutoModelForSequenceClassification, CAUSAL["llama"](), num_labels=3),
    ),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


def pair(task, model, **options):
    """Return (ours, peft's) on copies of one base, drawn from the same seed."""
    seq = task == "SEQ_2_SEQ_LM"
    torch.manual_seed(1)
    ours = get_peft_model(copy.deepcopy(model), CartridgeConfig(task_type=task, num_virtual_tokens=P, **options))
    theirs = by_peft(model, task, **options, **({"num_layers": 4} if seq else {}))
    if seq:
        stored = ours.encoder_of("default").stored()["prompt_embeddings"]
        theirs.prompt_encoder["default"].load_prompt_embeddings(stored)
    for name in [n for n in dict(ours.base_model.named_parameters()) if "modules_to_save" in n]:
        theirs.base_model.get_parameter(name).data.copy_(ours.base_model.get_parameter(name))
    return ours.eval(), theirs.eval()


def by_peft(model, task, kind="CartridgeConfig", **options):
    torch.manual_seed(1)
    config = getattr(peft, kind)(task_type=task, num_virtual_tokens=P, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config).eval()


def batch(task):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    labels = {
        "CAUSAL_LM": ids.masked_fill(mask == 0, -100),
        "SEQ_2_SEQ_LM": torch.randint(3, 64, (3, 4), generator=generator),
        "SEQ_CLS": torch.tensor([0, 1, 2]),
    }[task]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def cartridge(model):
    return model.prompt_encoder["default"]


@pytest.mark.parametrize("frozen", only([2], [0, 1, 2]))
@pytest.mark.parametrize("case", only(["llama", "bloom", "t5"], CASES))
def test_outputs_loss_and_gradient(case, frozen):
    task, model = CASES[case]
    ours, theirs = pair(task, model(), num_frozen_tokens=frozen)
    inputs = batch(task)
    a, b = ours(**inputs), theirs(**inputs)
    real = inputs["attention_mask"].bool() if task == "CAUSAL_LM" else slice(None)
    torch.testing.assert_close(a.logits[real], b.logits[real], **TOLERANCE)
    torch.testing.assert_close(a.loss, b.loss, **TOLERANCE)
    a.loss.backward()
    b.loss.backward()
    expected = cartridge(theirs).trainable_embedding.grad
    if task == "SEQ_2_SEQ_LM":  # PEFT gives the decoder every second of the layers it stores
        expected = expected.view(P - frozen, 4, -1)[:, ::2].flatten(1)
    torch.testing.assert_close(cartridge(ours).trainable_embedding.grad, expected, **TOLERANCE)
    if frozen:
        assert cartridge(ours).frozen_embedding.grad is None


def test_names_first_values_counts_and_training():
    ours, theirs = pair("CAUSAL_LM", causal("llama"), num_frozen_tokens=2)
    names = dict(ours.prompt_encoder.named_parameters())
    peers = dict(theirs.prompt_encoder.named_parameters())
    assert names.keys() == peers.keys()
    assert all(torch.equal(value, peers[name]) for name, value in names.items())
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    inputs = batch("CAUSAL_LM")
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    torch.testing.assert_close(cartridge(ours).weight, cartridge(theirs).weight, atol=1e-4, rtol=1e-4)
    indices = torch.zeros(3, P, dtype=torch.long)
    assert torch.equal(cartridge(ours)(indices)[1], cartridge(ours).embedding.weight)


@pytest.mark.parametrize("case", only(["llama"], CASES))
def test_files_both_ways(case, tmp_path):
    task, make = CASES[case]
    model = make()
    ours, theirs = pair(task, model)
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
    written, peers = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")
    )
    assert written.keys() == peers.keys()
    assert (written["peft_type"], written["num_frozen_tokens"]) == ("CARTRIDGE", 1)
    assert not any(p.requires_grad for p in again.parameters())


def test_generated_tokens():
    ours, theirs = pair("CAUSAL_LM", causal("llama"))
    ids = batch("CAUSAL_LM")["input_ids"][[0, 2]]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 7}
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


@pytest.mark.parametrize("case", only(["gpt2"], ["llama", "gpt2", "t5"]))
def test_what_peft_refuses(case, tmp_path):
    """Gradient checkpointing, and training a saved cartridge further."""
    task, make = CASES[case]
    model = seq2seq("t5", dropout_rate=0.0) if case == "t5" else make()
    get_peft_model(copy.deepcopy(model), CartridgeConfig(task_type=task, num_virtual_tokens=P)).save_pretrained(
        tmp_path
    )
    inputs, gradients = batch(task), []
    for checkpointing in (False, True):
        again = softprompt.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True)
        for module in again.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            recompute(again.base_model, {"use_reentrant": False})
        again.train()(**inputs, use_cache=False).loss.backward()
        gradients.append(cartridge(again).trainable_embedding.grad)
        assert not cartridge(again).frozen_embedding.requires_grad
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert bool(gradients[0].abs().sum(1).gt(0).all())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    tokenizer = byte_bpe(bos=True)
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save_pretrained(folder)
    return tokenizer, str(folder)


def llama():
    return build(tf.AutoModelForCausalLM, CAUSAL["llama"](), vocab_size=320)


TEXT = "is it good or bad, and what did they say about it when it came"


@pytest.mark.parametrize("kind", ["CartridgeConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("chat", [False, True])
def test_from_a_text_as_pefts_helper_does(kind, chat, words):
    tokenizer = copy.deepcopy(words[0])
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    model = llama()
    config = getattr(softprompt, kind)(task_type="CAUSAL_LM", num_virtual_tokens=P)
    ours = get_peft_model(copy.deepcopy(model), config)
    theirs = by_peft(model, "CAUSAL_LM", kind)
    for max_length in (None, 9):
        mine = softprompt.initialize_kv_prefix_from_text(ours, tokenizer, text=TEXT, max_length=max_length)
        other = peft.initialize_kv_prefix_from_text(theirs, tokenizer, text=TEXT, max_length=max_length)
        torch.testing.assert_close(mine, other, **TOLERANCE)
        found = ours.encoder_of("default").stored()["prompt_embeddings"]
        torch.testing.assert_close(found, mine)


@pytest.mark.parametrize("kind", [CartridgeConfig, PrefixTuningConfig])
def test_from_a_cache(kind):
    model = llama()
    ids = torch.arange(3, 12)[None]
    cache = model(ids, use_cache=True)[CACHE]
    ours = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    softprompt.initialize_kv_prefix_from_past_key_values(ours, past_key_values=cache)
    rest = ours(input_ids=ids[:, P:]).logits
    with ours.disable_adapter():
        whole = ours(input_ids=ids).logits
    torch.testing.assert_close(rest, whole[:, P:], **TOLERANCE)


def test_the_option_and_the_helper_start_alike(words):
    tokenizer, folder = words
    model = llama()
    config = CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, cartridge_init_text=TEXT,
        tokenizer_name_or_path=folder,
    )  # fmt: skip
    ours = get_peft_model(model, config)
    first = cartridge(ours).weight.detach().clone()
    softprompt.initialize_kv_prefix_from_text(ours, tokenizer, text=TEXT, use_chat_template=False)
    assert torch.equal(cartridge(ours).weight, first)
    short = CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3 * P, cartridge_init_text="it",
        tokenizer_name_or_path=folder,
    )  # fmt: skip
    ours.add_adapter("short", short)
    assert ours.encoder_of("short").weight.isfinite().all()


def test_what_the_helpers_refuse(words):
    tokenizer, _ = words
    start = softprompt.initialize_kv_prefix_from_text
    model = get_peft_model(llama(), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    with pytest.raises(ConfigError, match="Need at least 5 cached tokens"):
        start(model, tokenizer, text="a")
    for templated in (True, False):
        with pytest.raises(
            ConfigError, match=r"the text holds half of a character .*\\ud83d\) at 5 of a text; corr"
        ):
            start(model, tokenizer, text="late \ud83d" + TEXT, use_chat_template=templated)
    with pytest.raises(ConfigError, match="num_virtual_tokens is 3, but the prompt 'default' has 5"):
        start(model, tokenizer, text=TEXT, num_virtual_tokens=3)
    with pytest.raises(AdapterError, match="other"):
        start(model, tokenizer, text=TEXT, adapter_name="other")
    projected = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True)
    model.add_adapter("projected", projected)
    with pytest.raises(ConfigError, match="prefix_projection=True"):
        start(model, tokenizer, text=TEXT, adapter_name="projected")
    plain = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    with pytest.raises(ConfigError, match="must be a CARTRIDGE or PREFIX_TUNING adapter"):
        start(plain, tokenizer, text=TEXT)
    both = get_peft_model(seq2seq("t5"), CartridgeConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P))
    with pytest.raises(ConfigError, match="needs a decoder alone"):
        start(both, tokenizer, text=TEXT)


def test_composition_is_pefts(tmp_path):
    model = causal("llama")
    folders = []
    for number, frozen in enumerate([1, 2]):
        torch.manual_seed(number)
        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + number, num_frozen_tokens=frozen)
        folders.append(tmp_path / str(number))
        get_peft_model(copy.deepcopy(model), config).save_pretrained(folders[-1])
    softprompt.compose_cartridge_adapters(folders, output_path=tmp_path / "ours")
    peft.compose_cartridge_adapters(folders, output_path=tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    config, peer = (softprompt.PeftConfig.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert config.num_virtual_tokens == 2 * P + 1
    peer.peft_version = config.peft_version
    assert config == peer
    record = json.loads((tmp_path / "ours" / "softprompt.json").read_text())
    assert record["settings"]["composition"] == {"operation": "concatenation"}
    assert set(record["data"]["made_of"]) == {"1", "2"}
    loaded = softprompt.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    inputs = batch("CAUSAL_LM")
    there = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(loaded(**inputs).logits[real], there(**inputs).logits[real], **TOLERANCE)


def test_what_cannot_be_composed(tmp_path):
    made = {
        "one": (causal("llama"), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)),
        "prefix": (
            causal("llama"),
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        ),
        "other": (causal("gpt2"), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)),
    }
    for name, (model, config) in made.items():
        get_peft_model(model, config).save_pretrained(tmp_path / name)
    compose, out = softprompt.compose_cartridge_adapters, tmp_path / "out"
    with pytest.raises(ConfigError, match="expected 2 prompts or more"):
        compose([tmp_path / "one"], output_path=out)
    with pytest.raises(ConfigError, match=r"is not a CARTRIDGE adapter \(got PREFIX_TUNING\)"):
        compose([tmp_path / "one", tmp_path / "prefix"], output_path=out)
    with pytest.raises(FingerprintError):
        compose([tmp_path / "one", tmp_path / "other"], output_path=out)
    with pytest.raises(ConfigError, match="would write a pickle"):
        compose([tmp_path / "one"] * 2, output_path=out, safe_serialization=False)
    assert not out.exists()
    with pytest.raises(softprompt.SoftPromptError, match="keys and values of every layer"):
        softprompt.average_prompts([tmp_path / "one"] * 2)
    with pytest.raises(ConfigError, match="for attribute 'peft_type': 'CARTRIDGE' in"):
        softprompt.concatenate_prompts([tmp_path / "one", tmp_path / "prefix"])


def test_concatenated_cartridges_are_read_side_by_side(tmp_path, caplog):
    model = causal("llama")
    folders, parts = [], []
    for number in (1, 2):
        torch.manual_seed(number)
        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + number)
        peer = get_peft_model(copy.deepcopy(model), config)
        parts.append(peer.encoder_of("default").materialize().detach())
        folders.append(tmp_path / str(number))
        peer.save_pretrained(folders[-1])
    made = softprompt.concatenate_prompts(folders, tmp_path / "both")
    assert "usually answer worse than each alone" in caplog.text
    assert made.manifest.settings["composition"] == {"operation": "concatenation"}
    ids = [5, 9, 7, 20]
    loaded = softprompt.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "both").eval()
    expected = solo_logits_behind(model, torch.cat(parts, dim=3), ids)
    torch.testing.assert_close(loaded(input_ids=torch.tensor([ids])).logits[0, -4:], expected, **TOLERANCE)


def test_rows_of_a_batch_with_cartridges_a_prefix_and_none():
    model = get_peft_model(causal("llama"), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    model.add_adapter("prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    inputs = batch("CAUSAL_LM")
    names = ["default", "prefix", "__base__"]
    mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        real = inputs["attention_mask"][row].bool()
        alone = model(input_ids=inputs["input_ids"][row : row + 1, real], adapter_names=[name]).logits
        torch.testing.assert_close(mixed[row, real], alone[0], **TOLERANCE)
