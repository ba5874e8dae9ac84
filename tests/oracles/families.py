"""Tiny random models of many architectures, built from their configs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

V, H, L, A = 64, 32, 2, 4
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": L,
    "num_attention_heads": A,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    **IDS,
}
GQA = {**SIZES, "num_key_value_heads": 2}

Config = Callable[[], Any]

CAUSAL: dict[str, Config] = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=V, n_embd=H, n_layer=L, n_head=A, n_positions=64, **IDS),
    "llama": lambda: tf.LlamaConfig(**GQA),
    "mistral": lambda: tf.MistralConfig(**GQA, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(**GQA, num_local_experts=2, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**GQA),
    "qwen3": lambda: tf.Qwen3Config(**GQA, head_dim=8),
    "gemma": lambda: tf.GemmaConfig(**GQA, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(**GQA, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "phi": lambda: tf.PhiConfig(**SIZES),
    "phi3": lambda: tf.Phi3Config(**GQA),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "gptj": lambda: tf.GPTJConfig(vocab_size=V, n_embd=H, n_layer=L, n_head=A, rotary_dim=4, n_positions=64, **IDS),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=V,
        hidden_size=H,
        num_layers=L,
        num_heads=A,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=64,
        **IDS,
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=V,
        hidden_size=H,
        word_embed_proj_dim=16,
        num_hidden_layers=L,
        num_attention_heads=A,
        ffn_dim=48,
        max_position_embeddings=64,
        **IDS,
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=V, hidden_size=H, n_layer=L, n_head=A, **IDS),
    "mpt": lambda: tf.MptConfig(
        vocab_size=V, d_model=H, n_layers=L, n_heads=A, max_seq_len=64, expansion_ratio=2, **IDS
    ),
    "falcon": lambda: tf.FalconConfig(**SIZES, new_decoder_architecture=False),
    "olmo2": lambda: tf.Olmo2Config(**GQA),
    "granite": lambda: tf.GraniteConfig(**GQA, logits_scaling=2.0, embedding_multiplier=3.0),
    "cohere": lambda: tf.CohereConfig(**GQA),
    "smollm3": lambda: tf.SmolLM3Config(**GQA),
    "stablelm": lambda: tf.StableLmConfig(**GQA),
}

_SHARING: dict[str, Any] = {
    **GQA,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 8,
}
SHARING: dict[str, Config] = {
    "gemma4": lambda: tf.Gemma4TextConfig(
        **_SHARING, per_layer_config={str(i): {"head_dim": 16} for i in (1, 3)}, num_experts=None
    ),
    "gemma4-wide": lambda: tf.Gemma4TextConfig(
        **_SHARING | {"num_kv_shared_layers": 0},
        per_layer_config={str(i): {"head_dim": 16, "num_key_value_heads": 1} for i in (1, 3)},
    ),
    "gemma3n": lambda: tf.Gemma3nTextConfig(
        **_SHARING | {"intermediate_size": [48] * 4},
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
}
"""Decoders of which some layers read the keys and values of others, or have heads of other sizes."""

BART_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "d_model": H,
    "encoder_layers": L,
    "decoder_layers": L,
    "encoder_attention_heads": A,
    "decoder_attention_heads": A,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}

SEQ2SEQ: dict[str, Config] = {
    "t5": lambda: tf.T5Config(
        vocab_size=V,
        d_model=H,
        d_kv=8,
        d_ff=48,
        num_layers=L,
        num_heads=A,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    ),
    "bart": lambda: tf.BartConfig(**BART_SIZES, decoder_start_token_id=2, scale_embedding=True, **IDS),
    "mt5": lambda: tf.MT5Config(
        vocab_size=V,
        d_model=H,
        d_kv=8,
        d_ff=48,
        num_layers=L,
        num_heads=A,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    ),
    "mbart": lambda: tf.MBartConfig(**BART_SIZES, scale_embedding=True, **IDS),
    "pegasus": lambda: tf.PegasusConfig(**BART_SIZES, decoder_start_token_id=0, **IDS),
}

ENCODERS: dict[str, Config] = {
    "bert": lambda: tf.BertConfig(**SIZES),
    "roberta": lambda: tf.RobertaConfig(
        **{**SIZES, "pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 66}
    ),
    "electra": lambda: tf.ElectraConfig(**SIZES, embedding_size=16),
    "albert": lambda: tf.AlbertConfig(**SIZES, embedding_size=16),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=V,
        dim=H,
        n_layers=L,
        n_heads=A,
        hidden_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
}

ROTARY_ENCODERS: dict[str, Config] = {
    "modernbert": lambda: tf.ModernBertConfig(
        **SIZES, cls_token_id=1, sep_token_id=2, local_attention=8, global_attn_every_n_layers=2
    ),
    "eurobert": lambda: tf.EuroBertConfig(**GQA),
    "nomic_bert": lambda: tf.NomicBertConfig(**SIZES),
    "gte": lambda: tf.GteConfig(**SIZES),
    "jina_v3": lambda: tf.JinaEmbeddingsV3Config(**SIZES),
    "esm": lambda: tf.EsmConfig(**SIZES, mask_token_id=3, position_embedding_type="rotary"),
}


FOREST = [
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt_neox",
    "opt",
    "olmo2",
    "granite",
    "cohere",
    "smollm3",
    "stablelm",
]
"""Causal families that honour transformers' attention interface."""

OUTSIDE = [
    name
    for name in ("gptj", "gpt_neo", "bloom", "mpt", "falcon")
    if not hasattr(import_module(f"transformers.models.{name}.modeling_{name}"), "ALL_ATTENTION_FUNCTIONS")
]
"""Causal families that do not; GPT-J does since transformers 5.24."""


def build(loader: type, config: Any, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a random model in eval mode; ``changes`` are set on its config."""
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model: PreTrainedModel = loader.from_config(config)
    # Random heads and biases of zero hide mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def causal(name: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny causal language model of an architecture."""
    return build(tf.AutoModelForCausalLM, CAUSAL[name](), **changes)


def sharing(name: str) -> PreTrainedModel:
    """Return a tiny decoder of which layers share keys and values, or have heads of other sizes."""
    return build(tf.AutoModelForCausalLM, SHARING[name]())


def seq2seq(name: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny seq2seq language model of an architecture."""
    return build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ[name](), **changes)


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """Make logits differ by more than rounding, so that no greedy choice is a tie."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny frozen base, causal or seq2seq, whose choices are no ties and depend on what it reads."""
    if name not in SEQ2SEQ:
        return widened(causal(name, **changes)).requires_grad_(False)
    # With a wide head that is tied, a decoder only ever repeats the token it starts from.
    model: Any = widened(seq2seq(name, tie_word_embeddings=False, **changes))
    with torch.no_grad():
        for part in (model.get_encoder(), model.get_decoder()):
            part.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
    untied: PreTrainedModel = model.requires_grad_(False)
    return untied
