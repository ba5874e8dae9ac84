"""Tiny random bases as folders, and rows to tune on."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = "good bad fine poor this is the film was it a news report yes no : ?".split()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A causal and a seq2seq model of two layers, with a tokenizer of whole words."""
    root = tmp_path_factory.mktemp("bases")
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            attention_dropout=0.1,
            **ids,
        )
    )
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            init_std=0.2,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
            **ids,
        )
    )
    for name, model in (("llama", llama), ("bart", bart)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def llama(bases):
    return bases / "llama"


def _rows(count):
    kinds = [("good", "yes"), ("bad", "no"), ("fine", "yes"), ("poor", "no")]
    tails = ["", " news", " report it", " this is a film"]
    return [
        {"input": f"the film was {kinds[i % 4][0]}{tails[i % 3]}", "output": kinds[i % 4][1]} for i in range(count)
    ]


@pytest.fixture
def rows():
    return _rows(22)


@pytest.fixture
def held_out():
    return _rows(8)
