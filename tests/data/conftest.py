"""Tokenizers of every family, trained on a few sentences: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from softprompt.bundled import model_directory

SHARED = Path(__file__).parents[2].parent / "shared"

SENTENCES = [
    "the parcel arrived late and nobody answered the phone",
    "no complaint at all, thank you for the quick reply",
    "complaint: the parcel was broken, the parcel was wet",
    "is this a complaint? answer: no complaint",
    "positive or negative, the label is positive",
    "one two three four five six seven eight nine ten",
] * 4


def _around(tokenizer, pattern, *names):
    specials = [(name, tokenizer.token_to_id(name)) for name in names]
    return processors.TemplateProcessing(single=pattern, special_tokens=specials)


def make_gpt2_like():
    """Byte-level BPE, bos = eos, adds nothing by itself, no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def make_llama_like(*, adds_eos=False):
    """Metaspace BPE as sentencepiece exports it, with a BOS (and, if asked, an EOS)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Trained on words, as sentencepiece does, so that no piece spans a space.
    words = [word for sentence in SENTENCES for word in sentence.split()]
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    pattern = "<s> $A </s>" if adds_eos else "<s> $A"
    tokenizer.post_processor = _around(tokenizer, pattern, "<s>", "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def make_bert_like():
    """WordPiece with [CLS] and [SEP] and no EOS."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False),
    )
    tokenizer.post_processor = _around(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def make_t5_like():
    """Unigram with a metaspace pre-tokenizer and a trailing EOS."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = _around(tokenizer, "$A </s>", "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_bart_like():
    """Byte-level BPE framed as <s> … </s>."""
    tokenizer = make_gpt2_like().backend_tokenizer
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.post_processor = _around(tokenizer, "<s> $A </s>", "<s>", "</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def shared(path):
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"../shared/{path} is absent")
    return found


def real_tokenizer(name):
    return AutoTokenizer.from_pretrained(shared(f"models/{name}"))


MAKERS = {
    "gpt2": make_gpt2_like,
    "llama": make_llama_like,
    "llama+eos": lambda: make_llama_like(adds_eos=True),
    "bert": make_bert_like,
    "t5": make_t5_like,
    "bart": make_bart_like,
    "byt5": ByT5Tokenizer,
    "demo": lambda: AutoTokenizer.from_pretrained(model_directory()),
    "stories260K": lambda: real_tokenizer("stories260K"),
    "g2p": lambda: real_tokenizer("g2p-bart-us-onevocab"),
}


@pytest.fixture(scope="session")
def tokenizers():
    """Return a function from a family's name to its tokenizer, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKERS[name]()
        return made[name]

    return get


@pytest.fixture(scope="session", name="shared")
def shared_path():
    """Return a function from a path below ../shared to that file; absent ones skip the test."""
    return shared
