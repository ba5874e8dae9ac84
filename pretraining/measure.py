"""Third, optional step: measure what the model can do, on validation data only.

python -m pretraining.measure

Prints how well the model tells the mood of held-out messages when it is told the labels in words, and
how well a tuned prompt of twenty tokens learns the held-out task: fitted on the training split of the
bundled complaints, scored on their validation split. The test split is not read.
"""

import argparse
import json
import math
from pathlib import Path
from random import Random

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

from pretraining.handwritten import read_letters

TEMPLATE = "Message: {}\nLabel:"
START = "complaint means unhappy, something went wrong. no complaint means all else, happy or plain.\n"
Rows = list[tuple[str, str]]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("src/softprompt/bundled/model"))
    add("--task", type=Path, default=Path("src/softprompt/bundled/complaints"))
    add("--lr", type=float, nargs="*", default=[1.0], help="in units of the embeddings' rms")
    add("--epochs", type=int, default=15)
    add("--seeds", type=int, default=3)
    add("--virtual-tokens", type=int, default=20)
    add("--batch", type=int, default=16)
    add("--init", choices=["text", "sample"], default="text")
    add("--threads", type=int, default=2)
    return parser.parse_args()


def read_rows(path: Path) -> Rows:
    """Return (input, output) of each line of a JSON Lines file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(row["input"], row["output"]) for row in map(json.loads, lines)]


class Scorer:
    """Scores label words behind messages, with or without a soft prompt in front."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder).float().eval().requires_grad_(False)
        self.table = self.model.get_input_embeddings().weight
        self.rms = self.table.pow(2).mean().sqrt().item()

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_probs(self, texts: list[str], labels: list[str], prompt: torch.Tensor | None) -> torch.Tensor:
        """Return the summed log-probability of each label (and `</s>`) behind its text."""
        before = [self.ids(text) for text in texts]
        after = [[*self.ids(f" {label}"), self.tokenizer.eos_token_id] for label in labels]
        rows = [torch.tensor(a + b) for a, b in zip(before, after, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        inputs = functional.embedding(ids, self.table)
        shift = 0 if prompt is None else len(prompt)
        if prompt is not None:
            inputs = torch.cat([prompt.expand(len(ids), -1, -1), inputs], 1)
        logits = self.model(inputs_embeds=inputs).logits[:, shift:]
        found = functional.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
        place = torch.arange(1, ids.shape[1])
        first = torch.tensor([len(b) for b in before])[:, None]
        last = torch.tensor([len(row) for row in rows])[:, None]
        return (found * ((place >= first) & (place < last))).sum(1)

    @torch.no_grad()
    def accuracy(
        self,
        rows: Rows,
        prompt: torch.Tensor | None = None,
        order: str = "",
        batch: int = 32,
    ) -> float:
        """Return how often the true label is the likeliest of those in the rows."""
        names, right = sorted({label for _, label in rows}), 0
        rows = sorted(rows, key=lambda row: len(row[0]))
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            texts = [order + TEMPLATE.format(text) for text, _ in part]
            scores = [self.log_probs(texts, [name] * len(part), prompt) for name in names]
            best = torch.stack(scores).argmax(0).tolist()
            right += sum(names[i] == label for i, (_, label) in zip(best, part, strict=True))
        return right / len(rows)


def tune(scorer: Scorer, rows: Rows, lr: float, seed: int, args: argparse.Namespace) -> torch.Tensor:
    """Fit a soft prompt to the rows with AdamW and a rate that falls to zero."""
    rng = Random(seed)
    start = scorer.ids(START)
    if args.init == "sample":
        start = [rng.randrange(3, len(scorer.table)) for _ in range(args.virtual_tokens)]
    start = (start * args.virtual_tokens)[: args.virtual_tokens]
    prompt = torch.nn.Parameter(scorer.table[start].clone())
    optimizer = torch.optim.AdamW([prompt], lr=lr * scorer.rms, weight_decay=0.0)
    steps = args.epochs * math.ceil(len(rows) / args.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(args.epochs):
        shuffled = rng.sample(rows, len(rows))
        for first in range(0, len(rows), args.batch):
            part = shuffled[first : first + args.batch]
            texts = [TEMPLATE.format(text) for text, _ in part]
            loss = -scorer.log_probs(texts, [label for _, label in part], prompt).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return prompt.detach()


def main() -> None:
    """Print the measures of a model folder."""
    args = arguments()
    torch.set_num_threads(args.threads)
    scorer = Scorer(args.model)
    letters = [letter for letter in read_letters() if letter.held_out]
    fit, validation = (read_rows(args.task / f"{name}.jsonl") for name in ("train", "validation"))
    print(f"{len(letters)} held-out messages, embedding rms {scorer.rms:.4f}")
    upset = [(x.text, "yes" if x.mood == "unhappy" else "no") for x in letters]
    share = sum(label == "no" for _, label in upset) / len(upset)
    found = scorer.accuracy(upset, order="Is the customer unhappy? Choose from: yes, no.\n")
    print(f"unhappy or not, told in words: {found:.3f} (always no: {share:.3f})")
    moods = [(x.text, "happy" if x.mood == "relieved" else x.mood) for x in letters]
    order = "What is the mood? Choose from: unhappy, happy, neutral.\n"
    print(f"unhappy, happy or neutral: {scorer.accuracy(moods, order=order):.3f}")
    both = scorer.accuracy(fit + validation)
    print(f"complaints, template alone: {both:.3f} on train and validation", flush=True)
    told = scorer.accuracy(fit + validation, order=START)
    print(f"complaints, told in words: {told:.3f} on train and validation", flush=True)
    for lr in args.lr:
        found = []
        for seed in range(args.seeds):
            prompt = tune(scorer, fit, lr, seed, args)
            found.append(scorer.accuracy(validation, prompt))
            fitted = scorer.accuracy(fit, prompt)
            print(f"  lr {lr} seed {seed}: {found[-1]:.3f}, on train {fitted:.3f}", flush=True)
        mean = sum(found) / len(found)
        print(f"tuned prompt, lr {lr} x rms, {args.epochs} epochs: {mean:.3f} on validation")


if __name__ == "__main__":
    main()
