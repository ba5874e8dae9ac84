"""Tiny random models with a byte-level tokenizer: nothing learned, everything checkable."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["<s>", "</s>", "<pad>"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, "th", "Ġa"])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("Ġ", "a")]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _llama(tokenizer, seed=5):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        # Wide weights make logits differ by more than rounding, so that no greedy choice is a tie.
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def llama(tokenizer):
    return _llama(tokenizer)


@pytest.fixture(scope="session")
def bart(tokenizer):
    torch.manual_seed(6)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=96,
        init_std=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def t5(tokenizer):
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        initializer_factor=2.0,
        pad_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    return T5ForConditionalGeneration(config).eval()


@torch.no_grad()
def _answer_log_prob(model, prompt, source, answer):
    """Log p of an answer's tokens, from one unpadded row of embeddings: slow and obvious."""
    source, answer = tuple(source), tuple(answer)
    if model.config.is_encoder_decoder:
        embed = model.get_encoder().get_input_embeddings()
        rows = torch.cat([prompt, embed(torch.tensor(source))]).unsqueeze(0)
        logits = model(inputs_embeds=rows, labels=torch.tensor([answer])).logits[0]
    else:
        rows = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(source + answer))])
        first = len(prompt) + len(source)
        logits = model(inputs_embeds=rows.unsqueeze(0)).logits[0, first - 1 :]
    return sum(float(logits[i].log_softmax(-1)[token]) for i, token in enumerate(answer))


@pytest.fixture(scope="session")
def answer_log_prob():
    return _answer_log_prob


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer, llama, bart, t5):
    """The tiny models as a user has them: folders with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    for name, model in {
        "llama": llama,
        "bart": bart,
        "t5": t5,
        "other": _llama(tokenizer, seed=9),
    }.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root
