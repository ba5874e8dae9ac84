"""The module and the configuration of a cartridge, apart from any model."""

from __future__ import annotations

import copy

import pytest
import torch

from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import (
    CartridgeConfig,
    CartridgeEncoder,
    PeftConfig,
    PrefixEncoder,
    PrefixTuningConfig,
    build_prompt,
    prompt_embeddings_from_past_key_values,
)

P, L, A, D = 4, 2, 2, 3
SIZES = {"num_virtual_tokens": P, "num_layers": L, "num_attention_heads": A, "token_dim": A * D}
FLAT = L * 2 * A * D


def encoder(task="CAUSAL_LM", **options):
    return CartridgeEncoder(CartridgeConfig(task_type=task, **SIZES, **options))


def random_key_values(tokens, seed=0):
    """Return one pair of keys and values [1, A, T, D] for each layer."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, 1, A, tokens, D, generator=generator)) for _ in range(L)]


def test_the_order_of_the_values_is_that_of_a_prefix():
    flat = torch.randn(P, FLAT)
    cartridge, prefix = encoder(), PrefixEncoder(PrefixTuningConfig(task_type="CAUSAL_LM", **SIZES))
    for module in (cartridge, prefix):
        module.load_stored({"prompt_embeddings": flat})
    assert torch.equal(cartridge.materialize(), prefix.materialize())
    assert torch.equal(cartridge.stored()["prompt_embeddings"], flat)
    assert torch.equal(cartridge.prompt().prefix, cartridge.materialize())
    cartridge.load_prompt_embeddings(2 * flat)
    prefix.load_prompt_embeddings(2 * flat)
    assert torch.equal(cartridge.materialize(), prefix.materialize())


def test_a_seq2seq_file_is_that_of_a_prefix():
    cartridge = encoder("SEQ_2_SEQ_LM")
    prefix = PrefixEncoder(PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", **SIZES))
    prefix.load_stored(cartridge.stored())
    assert torch.equal(prefix.materialize(), cartridge.materialize())
    assert cartridge.stored()["prompt_embeddings"].shape == (P, 2 * FLAT)
    written = CartridgeConfig(task_type="SEQ_2_SEQ_LM", **SIZES).to_dict()
    assert (written["num_layers"], written["num_transformer_submodules"]) == (2 * L, 2)


@pytest.mark.parametrize("frozen", [0, 1, 3, P])
def test_frozen_tokens_are_never_trained(frozen):
    made = encoder(num_frozen_tokens=frozen)
    made.set_trainable(True)
    trained = [p for p in made.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == (P - frozen) * FLAT
    assert (made.num_frozen_tokens, made.num_trainable_tokens) == (frozen, P - frozen)
    before = made.weight.detach().clone()
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    made.materialize().square().sum().backward()
    optimiser.step()
    after = made.weight.detach()
    assert torch.equal(after[:frozen], before[:frozen])
    assert not (after[frozen:] == before[frozen:]).any()
    made.set_trainable(False)
    assert not any(p.requires_grad for p in made.parameters())
    again = copy.deepcopy(made)
    assert torch.equal(again.materialize(), made.materialize())


def test_a_text_is_repeated_or_cut_and_needs_a_base():
    config = CartridgeConfig(
        task_type="CAUSAL_LM", cartridge_init_text="hello", tokenizer_name_or_path="demo", **SIZES
    )
    words = torch.nn.Embedding(5, 6)
    with pytest.raises(ConfigError, match="cartridge_init_text needs the base model"):
        build_prompt(config, words)
    seen = []

    def key_values(ids):
        seen.extend(ids)
        return torch.arange(L * 2 * A * len(ids) * D).float().view(L, 2, A, len(ids), D)

    made = build_prompt(config, words, key_values=key_values)
    assert len(seen) == P
    assert torch.equal(made.materialize(), key_values(seen[:P]))
    with pytest.raises(ConfigError, match="the text's keys and values must be"):
        build_prompt(config, words, key_values=lambda ids: torch.zeros(L, 2, A, P + 1, D))


def test_a_generator_decides_everything():
    made = [
        CartridgeEncoder(
            CartridgeConfig(task_type="CAUSAL_LM", **SIZES),
            generator=torch.Generator().manual_seed(seed),
        ).weight
        for seed in (3, 3, 4)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_cannot_be_made_or_loaded():
    with pytest.raises(ConfigError, match="num_frozen_tokens must be at most num_virtual_tokens=4"):
        encoder(num_frozen_tokens=P + 1)
    with pytest.raises(ConfigError, match="num_frozen_tokens must be at least 0; got -1"):
        CartridgeConfig(num_frozen_tokens=-1)
    with pytest.raises(ConfigError, match="cartridge_init_text needs tokenizer_name_or_path"):
        CartridgeConfig(cartridge_init_text="a")
    with pytest.raises(ConfigError, match="would be ignored without cartridge_init_text"):
        CartridgeConfig(tokenizer_name_or_path="a")
    with pytest.raises(ConfigError, match="num_layers is missing"):
        CartridgeEncoder(CartridgeConfig(num_virtual_tokens=3))
    with pytest.raises(ArtifactError, match="was the prompt made for another base"):
        encoder().load_stored({"prompt_embeddings": torch.zeros(P, FLAT + 2)})
    with pytest.raises(ArtifactError, match="lacks prompt_embeddings"):
        encoder().load_stored({})
    with pytest.raises(ConfigError, match="task_ids go from 0 to 0"):
        encoder().materialize(1)


def test_a_config_round_trips():
    config = CartridgeConfig(task_type="CAUSAL_LM", num_frozen_tokens=2, **SIZES)
    assert PeftConfig.from_dict(config.to_dict()) == config
    text = CartridgeConfig(cartridge_init_text="a", tokenizer_name_or_path="b", **SIZES)
    assert text.to_dict().keys() == config.to_dict().keys()
    assert config.to_dict()["peft_type"] == "CARTRIDGE"


def test_a_cache_becomes_flat_as_pefts_helper_makes_it():
    import peft

    cache = random_key_values(7)
    ours = prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=P)
    theirs = peft.tuners.cartridge.utils.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=P)
    assert torch.equal(ours, theirs)
    made = encoder()
    made.load_prompt_embeddings(ours)
    for layer, pair in enumerate(cache):
        for part, values in enumerate(pair):
            assert torch.equal(made.materialize()[layer, part], values[0, :, :P])


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (random_key_values(P - 1), "Need at least 4 cached tokens, got 3"),
        (
            [(k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)) for k, v in random_key_values(5)],
            "batch=1",
        ),
        ([], "sequence of"),
        (7, "sequence of"),
        ([(1, 2)], "sequence of"),
        ([*random_key_values(5), *random_key_values(6)], "of one shape in all layers"),
        ([(k[0], v[0]) for k, v in random_key_values(5)], "of one shape in all layers"),
    ],
)
def test_what_is_no_cache_of_one_text(cache, message):
    with pytest.raises(ConfigError, match=message):
        prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=P)


def test_a_cache_that_has_lost_the_first_tokens_is_refused():
    """PEFT takes later tokens for the first; a static cache is read as far as it is filled."""
    from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer

    class Cache:
        layers = ()

    pairs = random_key_values(7)
    sliding, static = Cache(), Cache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=6) for _ in pairs]
    static.layers = [StaticLayer(max_cache_len=20) for _ in pairs]
    for cache in (sliding, static):
        for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
            layer.update(keys, values)
    with pytest.raises(ConfigError, match="no longer holds the first tokens: a layer keeps 5 of 7"):
        prompt_embeddings_from_past_key_values(sliding, num_virtual_tokens=P)
    expected = prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=P)
    read = prompt_embeddings_from_past_key_values(static, num_virtual_tokens=P)
    assert torch.equal(read, expected)
    with pytest.raises(ConfigError, match="Need at least 8 cached tokens, got 7"):
        prompt_embeddings_from_past_key_values(static, num_virtual_tokens=8)
