"""Tiny bases on disk with a tokenizer of fewer ids than rows, and prompts made for them."""

from __future__ import annotations

import torch
import transformers as tf

from oracles import families
from oracles.tokenizers import byte_bpe
from softprompt.artifacts import Manifest, Origin, save_adapter
from softprompt.backbone import Fingerprint, load_base

VOCABULARY = 330
P = 4
LOADERS = {"CAUSAL_LM": tf.AutoModelForCausalLM, "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM}


def write_base(directory, name, *, vocabulary=VOCABULARY, dtype=torch.float32, bos=True, **changes):
    """Save a tiny model of an architecture beside a tokenizer of about 300 ids."""
    build = families.seq2seq if name in families.SEQ2SEQ else families.causal
    model = families.widened(build(name, vocab_size=vocabulary, **changes).to(dtype))
    model.save_pretrained(directory)
    byte_bpe(bos=bos and name not in families.SEQ2SEQ).save_pretrained(directory)
    return str(directory)


def write_prompt(directory, base, *, manifest=True, tensors=None, seed=3, **changes):
    """Save a prompt of the size of a base's embeddings; ``changes`` go into its config."""
    loaded = load_base(base)
    table = loaded.model.get_input_embeddings()
    seen = table(torch.arange(table.weight.shape[0])).detach().float()
    seq2seq = loaded.model.config.is_encoder_decoder
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        "num_virtual_tokens": P,
        "num_transformer_submodules": 1,
        "token_dim": seen.shape[1],
        "base_model_name_or_path": base,
        **changes,
    }
    if tensors is None:
        count = P * config["num_transformer_submodules"]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, seen.shape[1], generator=generator)
        tensors = {"prompt_embeddings": noise * seen.std() * 2}
    told = Origin.of_base(loaded)
    written = Manifest(
        template="Text : {{input}} Label : ",
        task="generation",
        labels=None,
        base_model=base,
        base_fingerprint=Fingerprint.of(loaded.model).to_dict(),
        max_source_length=64,
        max_target_length=16,
        dtype=told.dtype,
        seq2seq=told.seq2seq,
    )
    save_adapter(directory, config, tensors, written if manifest else None, overwrite=False)
    return str(directory)
