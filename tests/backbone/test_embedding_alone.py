"""A base that is not run: its embedding in memory, everything else as it is in the files."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt.backbone import load_base
from softprompt.bundled import model_directory
from softprompt.errors import BackboneError


@pytest.fixture(scope="module")
def whole():
    return load_base("demo")


def test_it_is_known_as_the_whole_base_is(whole):
    light = load_base("demo", runs=False)
    assert light.facts == whole.facts
    assert light.fingerprint == whole.fingerprint
    assert light.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert torch.equal(light.embedding.weight, whole.embedding.weight)
    assert light.embedding.weight.dtype == whole.embedding.weight.dtype == torch.float32
    assert light.model.generation_config.eos_token_id == whole.model.generation_config.eos_token_id
    assert load_base("demo", runs=False, torch_dtype="bfloat16").embedding.weight.dtype == torch.bfloat16


def test_shards_and_names_without_their_prefix_are_found(whole, tmp_path):
    """As GPT-2's files have them: model.embed_tokens.weight is embed_tokens.weight."""
    tensors = load_file(model_directory() / "model.safetensors")
    whole.model.config.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    names = [name.removeprefix("model.") for name in tensors]
    files = {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[own] for name, own in zip(names, tensors, strict=True) if files[name] == file}
        save_file(part, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert load_base(tmp_path, runs=False).fingerprint == whole.fingerprint


def test_files_that_are_no_safetensors_are_refused(whole, tmp_path):
    whole.model.config.save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"expected model.safetensors in .*; save the base as safetensors"):
        load_base(tmp_path, runs=False)


def test_modules_made_later_have_their_weights():
    load_base("demo", runs=False)
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.slow
def test_weights_take_no_memory(tmp_path):
    """400 MB of layers that nobody looks at."""
    code = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from softprompt.backbone import load_base
from softprompt.bundled import model_directory
import shutil
if sys.argv[2] == "write":
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8)
    config = LlamaConfig(**sizes, vocab_size=4096)
    LlamaForCausalLM(config).save_pretrained(sys.argv[1])
    for path in model_directory().glob("tokenizer*"):
        shutil.copy(path, sys.argv[1])
else:
    load_base("demo", runs=False)
    # Pages of the files count as resident too, but the system takes them back.
    resident = lambda: int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0]) / 1024
    before = resident()
    base = load_base(sys.argv[1], runs=False)
    base.fingerprint
    print(resident() - before)
"""
    for what in ("write", "read"):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path, what], capture_output=True, text=True, check=True
        )
    assert float(done.stdout) < 100
