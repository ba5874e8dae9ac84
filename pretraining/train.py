"""Second step: pretrain the model on the packed tokens and write its folder.

python -m pretraining.train

The learning rate warms up, stays, and falls to zero over the last part of the steps; the context
grows from 256 to the full 512 tokens near the end. A run that was stopped goes on from its last
checkpoint in the work folder when the command is repeated.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pretraining.corpus import CONTEXT

CARD = Path(__file__).parent / "model_card.md"
SHORT_CONTEXT = 256


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, default=Path("build/pretraining"), help="folder of pretraining.prepare")
    add("--out", type=Path, default=Path("src/softprompt/bundled/model"), help="model folder")
    add("--steps", type=int, default=7000)
    add("--batch-tokens", type=int, default=2048, help="tokens of one step")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=256)
    add("--dropout", type=float, default=0.1)
    add("--warmup", type=int, default=150, help="steps")
    add("--decay-share", type=float, default=0.35, help="last part of the steps, lr falls to 0")
    add("--long-share", type=float, default=0.1, help="last part of the steps, full context")
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--threads", type=int, default=2, help="part of what makes a run reproducible")
    add("--seed", type=int, default=0)
    add("--no-compile", dest="compile", action="store_false", help="plain eager steps")
    return parser.parse_args()


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int) -> LlamaForCausalLM:
    """Return a Llama with fresh weights and the special tokens of the tokenizer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=round(hidden * 2.75 / 64) * 64,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves gains and embeddings alone."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim < 2 or p is embedding]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step: warm up, stay, fall to zero."""
    rise = min(1.0, (step + 1) / args.warmup)
    fall = min(1.0, (args.steps - step) / (args.steps * args.decay_share))
    return args.lr * rise * fall


def next_token_loss(model: LlamaForCausalLM, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean cross entropy of predicting each token from those before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Drop a share of what the embeddings say, in training only."""

    def drop(module: nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, share, module.training)

    model.get_input_embeddings().register_forward_hook(drop)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: np.ndarray, batch: int = 16) -> float:
    """Return the perplexity on a row of ids, in windows of the full context."""
    model.eval()
    windows = torch.from_numpy(ids[: len(ids) // CONTEXT * CONTEXT].astype(np.int64))
    parts = windows.view(-1, CONTEXT).split(batch)
    losses = [(next_token_loss(model, part, torch.ones(part.shape)).item(), len(part)) for part in parts]
    model.train()
    return math.exp(sum(loss * n for loss, n in losses) / sum(n for _, n in losses))


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder: stored in bfloat16 to halve it, declared to load in float32."""
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config.pad_token_id = tokenizer.pad_token_id
    stored.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)


def write_card(model: LlamaForCausalLM, args: argparse.Namespace, seconds: float) -> None:
    """Fill in the numbers of the model card and put it into the model folder."""
    held_out = {
        name: perplexity(model, np.load(args.work / f"held_out_{name}.npy")) for name in ("messages", "queries")
    }
    print("held-out perplexity", held_out, flush=True)
    card = CARD.read_text(encoding="utf-8").format(
        parameters=f"{model.num_parameters():,}",
        layers=args.layers,
        hidden=args.hidden,
        vocabulary=model.config.vocab_size,
        context=CONTEXT,
        steps=f"{args.steps:,}",
        batch_tokens=f"{args.batch_tokens:,}",
        tokens=f"{args.steps * args.batch_tokens / 1e6:.1f}",
        lr=args.lr,
        seed=args.seed,
        minutes=round(seconds / 60),
        messages_perplexity=f"{held_out['messages']:.1f}",
        queries_perplexity=f"{held_out['queries']:.1f}",
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Train for the given steps, with checkpoints, and write the model folder."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    ids = np.load(args.work / "train.npy", mmap_mode="r")
    weights_of = np.load(args.work / "train_weights.npy", mmap_mode="r")
    if len(ids) < args.steps * args.batch_tokens:
        raise SystemExit(f"{args.steps} steps need more than the {len(ids)} tokens prepared")
    model = build_model(tokenizer, args.layers, args.hidden)
    add_dropout(model, args.dropout)
    optimizer = build_optimizer(model, args.lr)
    checkpoint, step, seconds = args.work / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"])
    loss_of = torch.compile(next_token_loss) if args.compile else next_token_loss
    began, recent = time.time() - seconds, []
    while step < args.steps:
        long = step >= args.steps * (1 - args.long_share)
        part = slice(step * args.batch_tokens, (step + 1) * args.batch_tokens)
        rows = torch.from_numpy(ids[part].astype(np.int64))
        weights = torch.from_numpy(weights_of[part].astype(np.float32))
        shape = (-1, CONTEXT if long else SHORT_CONTEXT)
        loss = loss_of(model, rows.view(shape), weights.view(shape))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        step += 1
        if step % 50 == 0:
            seconds = time.time() - began
            left = seconds / step * (args.steps - step) / 60
            mean = sum(recent) / len(recent)
            print(f"step {step} loss {mean:.3f} {seconds:.0f} s, {left:.1f} min left", flush=True)
            recent.clear()
        if step % args.save_every == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "seconds": time.time() - began}
            state["random"] = torch.get_rng_state()
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            export(model, tokenizer, args.out)
    write_card(model, args, time.time() - began)


if __name__ == "__main__":
    main()
