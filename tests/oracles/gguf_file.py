"""The bundled model as a GGUF file, as llama.cpp's converter writes a Llama."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM

from softprompt.bundled import model_directory

CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path, *, seed=None, quantised=False):
    """Write the model, or one with other weights, in float32 or with 8-bit matrices."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(model_directory())
    if seed is not None:
        torch.manual_seed(seed)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.05)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _tokenizer(writer)
    for name, weight in _tensors(model):
        array, kind = weight.detach().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0
        if quantised and weight.dim() > 1:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _tokenizer(writer):
    files = json.loads((model_directory() / "tokenizer.json").read_text(encoding="utf-8"))
    words = sorted(files["model"]["vocab"].items(), key=lambda item: item[1])
    special = {each["id"] for each in files["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if number in special else 1 for _, number in words])
    writer.add_token_merges([" ".join(pair) for pair in files["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT)


def _tensors(model):
    state = model.state_dict()
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in _LAYER.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):  # ggml's rotation pairs neighbours
                heads = model.config.num_attention_heads
                halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            yield f"blk.{layer}.{theirs}.weight", weight
