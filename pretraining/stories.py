"""Sample short stories from the small TinyStories model: plain English that may be redistributed."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM


def sample_stories(model_folder: Path, seed: int, batches: int = 5, batch_size: int = 256) -> list[str]:
    """Return `batches * batch_size` stories of up to 360 tokens, cut at their last full sentence."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    torch.manual_seed(seed)
    start = torch.full((batch_size, 1), model.config.bos_token_id)
    stories = []
    for _ in range(batches):
        rows = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=0.9,
            top_k=0,
            top_p=0.95,
            max_new_tokens=360,
            pad_token_id=model.config.eos_token_id,
        )
        for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
            end = max(text.rfind(mark) for mark in ".!?")
            if end > 80:
                stories.append(text[: end + 1].strip())
    return stories
