"""mlx-lm's prompt cache: what its loader makes of the file, and what the base says behind it."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

from oracles.caches import CACHE
from oracles.prefixed import filled, solo_logits_behind
from oracles.tiny_bases import P, write_base, write_prompt
from softprompt.backbone import load_base
from softprompt.cli.main import run
from softprompt.errors import ArtifactError, ConfigError
from softprompt.inference import convert, load

LAYERS, HEADS, WIDTH = 2, 2, 8
KINDS = {"CARTRIDGE": {"num_frozen_tokens": 1}, "PREFIX_TUNING": {}}


def prompt_of(folder, base, kind, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    sizes = {"num_layers": LAYERS, "num_attention_heads": HEADS, "token_dim": HEADS * WIDTH}
    values = torch.randn(P, LAYERS * 2 * HEADS * WIDTH, generator=generator)
    tensors = {"prompt_embeddings": values * scale}
    return write_prompt(folder, base, tensors=tensors, peft_type=kind, **sizes, **KINDS[kind])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": HEADS}
    return write_base(tmp_path_factory.mktemp("base"), "llama", **sizes)


def nested(pairs):
    """Return a flattened tree as nested mappings by its parts, as ``mlx.utils.tree_unflatten`` reads it."""
    tree = {}
    for name, value in pairs:
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def read_as_mlx_lm_does(path):
    """Return the layers as (class, keys, values, offset), and the user's metadata."""
    with safe_open(path, "pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        user, classes, scalars = (nested(file.metadata().items())[part] for part in "012")
    assert scalars.pop("0") == ""
    for scalar in scalars.values():
        assert scalar["1"] == "scalar"
        arrays[scalar["0"]] = arrays[scalar["0"]].item()
    layers = nested(arrays.items())
    ordered = [layers[str(index)] for index in range(len(layers))]
    return [(classes[str(i)], each["0"], each["1"], each["2"]) for i, each in enumerate(ordered)], user


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_answers_behind_the_cache_as_behind_the_prompt(tmp_path, base, kind):
    folder = prompt_of(tmp_path / "kv", base, kind)
    done = convert(folder, tmp_path / "cache.safetensors", to="mlx-lm")
    assert done.facts == {"tokens": P, "layers": LAYERS, "dtype": "float32"}
    assert "template" in done.lost
    layers, user = read_as_mlx_lm_does(tmp_path / "cache.safetensors")
    assert user == {"model": base, "tokenizer_config": "{}"}
    assert [(name, offset) for name, _, _, offset in layers] == [("KVCache", P)] * LAYERS
    prompt = load(folder)
    cache = DynamicCache()
    for index, (_, keys, values, _) in enumerate(layers):
        assert keys.shape == values.shape == (1, HEADS, P, WIDTH)
        cache.update(keys, values, index)
    ids = torch.tensor([[5, 9, 7, 20]])
    positions = torch.arange(P, P + 4)[None]
    mask = torch.ones(1, P + 4, dtype=torch.long)
    with torch.no_grad():
        got = prompt.base.model(ids, **{CACHE: cache}, attention_mask=mask, position_ids=positions).logits[0]
        wanted = solo_logits_behind(prompt.base.model, prompt.module.prompt().prefix, ids[0].tolist())
        assert torch.allclose(got, wanted, atol=1e-5)
        assert not torch.allclose(got, solo_logits_behind(prompt.base.model, None, ids[0].tolist()), atol=1e-2)


def test_mlx_lm_itself_reads_it(tmp_path, base):
    cache = pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")
    folder = prompt_of(tmp_path / "kv", base, "CARTRIDGE")
    convert(folder, tmp_path / "cache.safetensors", to="mlx-lm")
    layers = cache.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    kept = filled(load(folder).module.prompt().prefix.detach())
    assert [each.offset for each in layers] == [P] * LAYERS
    for read, mine in zip(layers, kept.layers, strict=True):
        assert read.keys.tolist() == mine.keys.tolist()
        assert read.values.tolist() == mine.values.tolist()


def test_the_command_writes_it_once(tmp_path, base, capsys):
    folder, output = prompt_of(tmp_path / "kv", base, "CARTRIDGE"), str(tmp_path / "cache.safetensors")
    assert run(["convert", folder, output, "--to", "mlx-lm", "--quiet"]) == 0
    assert "mlx-lm" in capsys.readouterr().out
    assert run(["convert", folder, output, "--to", "mlx-lm", "--quiet"]) == 2
    assert run(["convert", output, str(tmp_path / "back"), "--to", "peft", "--quiet"]) == 2
    assert "only written" in capsys.readouterr().err


def test_what_a_prompt_cache_cannot_hold(tmp_path, base):
    def refused(expected, folder, name="x.safetensors", error=ArtifactError, **options):
        with pytest.raises(error, match=expected):
            convert(folder, tmp_path / name, to="mlx-lm", **options)

    refused("it is PROMPT_TUNING.*keys and values", write_prompt(tmp_path / "tokens", base))
    folder = prompt_of(tmp_path / "kv", base, "CARTRIDGE")
    refused("end its name in .safetensors", folder, "x.npy", error=ConfigError)
    sliding = write_base(tmp_path / "sliding", "mistral", num_hidden_layers=LAYERS)
    refused("sliding windows", prompt_of(tmp_path / "other", sliding, "CARTRIDGE"))
    half = load_base(base, torch_dtype="float16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    large = prompt_of(tmp_path / "large", str(tmp_path / "half"), "CARTRIDGE", 1e6)
    refused("the keys and values of .*large overflow torch.float16, the base's dtype; train it in bfloat16", large)


def test_it_is_written_in_the_dtype_of_the_base(tmp_path, base):
    half = load_base(base, torch_dtype="bfloat16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    folder = prompt_of(tmp_path / "kv", str(tmp_path / "half"), "CARTRIDGE")
    convert(folder, tmp_path / "cache.safetensors", to="mlx-lm")
    ((_, keys, _, _), *_), _ = read_as_mlx_lm_does(tmp_path / "cache.safetensors")
    assert keys.dtype == torch.bfloat16
