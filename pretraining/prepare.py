"""First step: write stories, tokenizer and packed token ids into the work folder.

python -m pretraining.prepare
"""

import argparse
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from pretraining.corpus import LATE, Corpus, pack, train_tokenizer, unmarked
from pretraining.handwritten import read_letters
from pretraining.sources import banking_queries
from pretraining.stories import sample_stories

VOCABULARY = 4096
# in the loss, where other tokens weigh 1
EARLY_ANSWER_WEIGHT, LATE_ANSWER_WEIGHT = 5, 20
SAMPLE = 60_000  # documents that the tokenizer is trained on


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="data sets")
    parser.add_argument("--stories-model", type=Path, default=Path("../shared/models/stories260K"), help="sampled")
    parser.add_argument("--work", type=Path, default=Path("build/pretraining"), help="written to")
    parser.add_argument("--early-tokens", type=int, default=2_500_000, help="of the first mixture")
    parser.add_argument("--late-tokens", type=int, default=15_500_000, help="of the second mixture")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def save_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str], path: Path) -> None:
    """Write texts as one row of ids, `</s>` behind each."""
    ids = [i for row in tokenizer(texts)["input_ids"] for i in [*row, tokenizer.eos_token_id]]
    np.save(path, np.array(ids, dtype=np.uint16))


def main() -> None:
    """Build everything that `pretraining.train` reads."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    stories_file = args.work / "stories.json"
    if not stories_file.exists():
        stories_file.write_text(json.dumps(sample_stories(args.stories_model, args.seed)))
    corpus = Corpus.read(args.data, json.loads(stories_file.read_text()))
    sample = [unmarked(text)[0] for text in islice(corpus.documents(args.seed + 1), SAMPLE)]
    tokenizer = train_tokenizer(sample, VOCABULARY)
    tokenizer.save_pretrained(args.work / "tokenizer")
    later = replace(corpus, mixture=LATE)
    parts = [
        pack(tokenizer, corpus.documents(args.seed + 2), args.early_tokens, EARLY_ANSWER_WEIGHT),
        pack(tokenizer, later.documents(args.seed + 3), args.late_tokens, LATE_ANSWER_WEIGHT),
    ]
    np.save(args.work / "train.npy", np.concatenate([ids for ids, _ in parts]))
    np.save(args.work / "train_weights.npy", np.concatenate([weights for _, weights in parts]))
    texts = [query for query, _ in banking_queries(args.data, "test")]
    save_texts(tokenizer, texts, args.work / "held_out_queries.npy")
    texts = [letter.text for letter in read_letters() if letter.held_out]
    save_texts(tokenizer, texts, args.work / "held_out_messages.npy")
    total = sum(len(ids) for ids, _ in parts)
    print(f"{total} tokens and a vocabulary of {len(tokenizer)} in {args.work}")


if __name__ == "__main__":
    main()
