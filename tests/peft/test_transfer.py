"""A prompt that starts from another: of this base, of another length, of another base."""

from __future__ import annotations

import dataclasses
import json
import logging

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oracles.tokenizers import byte_bpe
from softprompt import PeftModel, PromptEmbedding, PromptTuningConfig, get_peft_model
from softprompt.artifacts import transferred_embeddings
from softprompt.backbone import input_embedding
from softprompt.errors import ArtifactError, BackboneError, ConfigError, FingerprintError
from softprompt.prompts import PromptTuningInit


def llama(seed, width=16):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def words():
    return byte_bpe()


@pytest.fixture(scope="module")
def root(tmp_path_factory, words):
    """Two bases with one vocabulary; the second's table is a linear image of the first's."""
    root = tmp_path_factory.mktemp("bases")
    first, second = llama(1), llama(2, width=24)
    linear = torch.randn(16, 24, generator=torch.Generator().manual_seed(3)) / 4
    with torch.no_grad():
        input_embedding(second).weight.copy_(input_embedding(first).weight @ linear)
    torch.save(linear, root / "linear.pt")
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    return root


def base(root, name="first"):
    return LlamaForCausalLM.from_pretrained(root / name)


@pytest.fixture(scope="module")
def source(root):
    """A saved prompt of 4 rows on the first base."""
    torch.manual_seed(7)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(base(root), config)
    model.save_pretrained(root / "source")
    return root / "source"


def rows(model):
    return model.encoder_of("default").materialize().detach()


def stored(source, root):
    return rows(PeftModel.from_pretrained(base(root), source))


def started(root, source, length, name="first"):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prompt_tuning_init="PROMPT",
        prompt_tuning_init_prompt=str(source),
    )
    return get_peft_model(base(root, name), config)


def test_the_first_rows_are_those_of_the_source(root, source, caplog):
    with caplog.at_level(logging.INFO, "softprompt"):
        model = started(root, source, 4)
    assert torch.equal(rows(model), stored(source, root))
    assert rows(model).shape == (4, 16)
    assert model.encoder_of("default").materialize().requires_grad
    assert f"the prompt starts from {source}" in caplog.text
    assert model.peft_config["default"].inference_mode is False


@pytest.mark.parametrize("length", [1, 3, 9])
def test_another_length(root, source, length):
    own = stored(source, root)
    expected = torch.stack([own[i % 4] for i in range(length)])
    assert torch.equal(rows(started(root, source, length)), expected)


def test_another_base_gets_the_linear_image(root, source, caplog):
    with caplog.at_level(logging.WARNING, "softprompt"):
        model = started(root, source, 4, "second")
    expected = stored(source, root) @ torch.load(root / "linear.pt", weights_only=True)
    torch.testing.assert_close(rows(model), expected, rtol=1e-3, atol=1e-4)
    assert "approximate: relative error 0.000" in caplog.text
    found = transferred_embeddings(source, base(root, "second"), 6)
    assert found.embeddings.shape == (6, 24)
    assert found.recycled.error < 1e-4
    assert "its 4 virtual tokens made 6" in found.note


def test_a_map_between_unrelated_bases_is_called_worthless(root, source, words, tmp_path):
    unrelated = llama(9, width=24)
    words.save_pretrained(tmp_path)
    found = transferred_embeddings(source, unrelated, 4, tokenizer_name=str(tmp_path))
    assert found.recycled.error > 0.9
    assert "next to nothing: RANDOM or TEXT" in found.note
    near = transferred_embeddings(source, base(root, "second"), 4)
    assert "next to nothing" not in near.note


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_where_it_started_from_is_no_part_of_the_artifact(root, source, tmp_path):
    started(root, source, 4).save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING"
    assert "prompt_tuning_init_prompt" not in config
    theirs = peft.PeftModel.from_pretrained(base(root), str(tmp_path / "out"))
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, stored(source, root))
    again = PeftModel.from_pretrained(base(root), tmp_path / "out")
    assert torch.equal(rows(again), stored(source, root))
    more = PeftModel.from_pretrained(base(root), tmp_path / "out", is_trainable=True)
    assert more.encoder_of("default").materialize().requires_grad


def test_a_base_that_is_gone_or_changed(root, source, tmp_path):
    manifest = json.loads((source / "softprompt.json").read_text())
    for name, expected in (
        ("/no/such/base", BackboneError),
        (str(root / "second"), FingerprintError),
    ):
        moved = tmp_path / name.replace("/", "_")
        moved.mkdir()
        for file in source.iterdir():
            (moved / file.name).write_bytes(file.read_bytes())
        (moved / "softprompt.json").write_text(json.dumps(manifest | {"base_model": name}))
        with pytest.raises(expected, match="was made for"):
            transferred_embeddings(moved, base(root, "second"), 4)
        assert len(transferred_embeddings(moved, base(root), 4).embeddings) == 4


def changed(source, target, config=None, record=None):
    """Copy a prompt with other values in its files; without ``record`` there is no softprompt.json."""
    target.mkdir()
    values = json.loads((source / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(values))
    weights = "adapter_model.safetensors"
    (target / weights).write_bytes((source / weights).read_bytes())
    if record is not None:
        values = json.loads((source / "softprompt.json").read_text()) | record
        (target / "softprompt.json").write_text(json.dumps(values))
    return target


def other_of_the_width(root, words, tmp_path):
    """A base with the width and the vocabulary of the first, and other weights."""
    unlike = llama(8)
    with torch.no_grad():
        input_embedding(unlike).weight.mul_(2)
    unlike.save_pretrained(tmp_path / "third")
    words.save_pretrained(tmp_path / "third")
    return LlamaForCausalLM.from_pretrained(tmp_path / "third")


@pytest.mark.parametrize("record", [None, {"base_fingerprint": {}}])
def test_a_prompt_without_a_fingerprint_is_of_the_base_it_names(root, source, words, tmp_path, record):
    bare = changed(source, tmp_path / "bare", record=record)
    own = stored(source, root)
    assert torch.equal(transferred_embeddings(bare, base(root), 4).embeddings, own)
    assert transferred_embeddings(bare, base(root, "second"), 4).recycled.error < 1e-4
    mapped = transferred_embeddings(bare, other_of_the_width(root, words, tmp_path), 4)
    assert mapped.recycled is not None
    assert not torch.equal(mapped.embeddings, own)
    base(root).save_pretrained(tmp_path / "renamed")
    renamed = LlamaForCausalLM.from_pretrained(tmp_path / "renamed")
    assert torch.equal(transferred_embeddings(bare, renamed, 4).embeddings, own)


def test_a_prompt_that_names_no_base_is_refused(root, source, tmp_path):
    nameless = changed(source, tmp_path / "n", {"base_model_name_or_path": None})
    with pytest.raises(ConfigError, match=r"its base is None.*--base-model. first"):
        transferred_embeddings(nameless, base(root), 4)
    with pytest.raises(ConfigError, match="tokens are 16 wide, not 24"):
        transferred_embeddings(nameless, base(root, "second"), 4)


def test_rows_for_the_answer_do_not_start_rows_for_the_input(root, source, tmp_path):
    of_decoder = {"peft_type": "EXTENDED_PROMPT_TUNING", "output_model_types": ["DECODER"]}
    answer = changed(source, tmp_path / "a", of_decoder | {"task_type": "SEQ_2_SEQ_LM"})
    with pytest.raises(ConfigError, match="stand before the answer, not before the input"):
        transferred_embeddings(answer, base(root), 4)


def test_what_cannot_be_started_from(root, source):
    with pytest.raises(ArtifactError, match="no folder"):
        started(root, "/no/such/prompt", 4)
    with pytest.raises(ConfigError, match="use get_peft_model"):
        PromptEmbedding(
            dataclasses.replace(
                PromptTuningConfig(num_virtual_tokens=2),
                prompt_tuning_init=PromptTuningInit.PROMPT,
                prompt_tuning_init_prompt=str(source),
            ),
            torch.nn.Embedding(8, 4),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init": "PROMPT"}, "prompt_tuning_init_prompt can't be None"),
        ({"prompt_tuning_init_prompt": "x"}, "would be ignored with prompt_tuning_init='RANDOM'"),
        (
            {
                "prompt_tuning_init": "PROMPT",
                "prompt_tuning_init_prompt": "x",
                "parameterization": "residual",
            },
            "cannot be given",
        ),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        PromptTuningConfig(num_virtual_tokens=2, **options)
