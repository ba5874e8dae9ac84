"""What a prompt's length alone does to an encoder with learned positions.

A prompt of P tokens moves the text to positions P, P+1, ... Here nothing is put in front: the
frozen model reads American spellings at later positions, and the share of words that it still
pronounces as its lexicon does is counted.

    python bench/position_shift.py [--words 200] [--shared ../shared] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from alone import alone
from real_data import G2P, present

SHIFTS = (0, 1, 2, 4, 10)


def american(shared: Path, count: int) -> list[tuple[str, str]]:
    """Draw words of the American lexicon that the model has the letters for."""
    config = json.loads(present(shared / f"{G2P}/config.json").read_text(encoding="utf-8"))
    letters = set(config["grapheme_chars"])
    path = present(shared / "data/g2p_lexicon/us_gold.json")
    lexicon = json.loads(path.read_text(encoding="utf-8"))
    words = [word for word in sorted(lexicon) if isinstance(lexicon[word], str)]
    words = [word for word in words if set(word) <= letters]
    random.Random(0).shuffle(words)
    return [(word, lexicon[word]) for word in words[:count]]


def share_right(model: Any, tokenizer: Any, words: list[tuple[str, str]]) -> float:
    """Return the share of words whose generated pronunciation is the lexicon's."""
    right = 0
    for start in range(0, len(words), 50):
        part = words[start : start + 50]
        inputs = tokenizer([word for word, _ in part], padding=True, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=40,
            )
        answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
        pairs = zip(answers, part, strict=True)
        right += sum(answer.strip() == sound for answer, (_, sound) in pairs)
    return right / len(words)


def main() -> None:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--words", type=int, default=200, help="words to pronounce")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(__file__).parents[1].parent / "shared",
        help="folder of data and models",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    tf.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    words = american(options.shared, options.words)
    folder = options.shared / G2P
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    positions = model.get_encoder().embed_positions
    own = positions.offset
    found = {}
    for shift in SHIFTS:
        positions.offset = own + shift
        found[shift] = share_right(model, tokenizer, words)
    if options.json:
        print(json.dumps({"words": len(words), "exact_match": found}))
        return
    print("| text starts at position | " + " | ".join(str(shift) for shift in found) + " |")
    print("|---|" + "---|" * len(found))
    print("| exact match | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |")


if __name__ == "__main__":
    alone()
    main()
