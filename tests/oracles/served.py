"""A tiny base with prompts of every kind on it, and the answers that each gives alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from oracles.families import tiny
from oracles.solo import solo
from oracles.tokenizers import byte_bpe
from softprompt import PrefixTuningConfig, PromptTuningConfig
from softprompt.artifacts import Manifest, started_prompt
from softprompt.backbone import Base, Fingerprint
from softprompt.engine import EngineRow, PlainEngine, completed
from softprompt.generation import GenerationOptions, Request
from softprompt.inference import TunedPrompt
from softprompt.prompts import Prompt

VOCABULARY = 330


@dataclass
class Served:
    """A base, its tokenizer, and prompts by name; ``None`` is the base alone."""

    base: Base
    prompts: dict[str, TunedPrompt]
    values: dict[str, Prompt]

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    def request(self, name: str | None, ids: tuple[int, ...], **more: Any) -> Request:
        """Return a request for a named prompt, as its TunedPrompt would place it."""
        if name is None:
            decode = next(iter(self.prompts.values())).rows.decode
            return Request(ids, decode=decode, **more)
        rows = self.prompts[name].rows
        return Request(ids, self.values[name], rows.offset(ids), decode=rows.decode, **more)

    def alone(self, name: str | None, ids: tuple[int, ...], options: GenerationOptions) -> Any:
        """Return the answer to one row by transformers' own loop; see ``solo``."""
        return solo(self.base, self.request(name, ids, options=options))

    def log_probs(self, request: Request, tokens: tuple[int, ...]) -> list[float]:
        """Return log p of each token behind a request's input, by the plain engine."""
        row = EngineRow(request.ids, tokens, request.prompt, request.at)
        with torch.no_grad():
            return PlainEngine(self.base).target_log_probs([row]).values.tolist()


def served(name: str, *, kinds: tuple[str, ...] = ("plain", "other", "suffix", "prefix"), **changes: Any) -> Served:
    """Return prompts of some kinds on one tiny base."""
    model = tiny(name, **{"vocab_size": VOCABULARY, **changes})
    seq2seq = model.config.is_encoder_decoder
    task = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    tokenizer = byte_bpe(bos=not seq2seq)
    configs = {
        "plain": PromptTuningConfig(task_type=task, num_virtual_tokens=5),
        "other": PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        "suffix": PromptTuningConfig(task_type=task, num_virtual_tokens=4, placement="suffix"),
        "after_bos": PromptTuningConfig(task_type=task, num_virtual_tokens=4, placement="after_bos"),
        "prefix": PrefixTuningConfig(task_type=task, num_virtual_tokens=6),
    }
    base = Base(model.requires_grad_(False).eval(), tokenizer, "tiny")
    generator = torch.Generator().manual_seed(1)
    manifest = Manifest(
        template="{{input}}",
        task="generation",
        labels=None,
        base_model="tiny",
        base_fingerprint=Fingerprint.of(model).to_dict(),
        max_source_length=64,
        max_target_length=32,
        dtype="float32",
        seq2seq=seq2seq,
    )
    prompts = {}
    for kind in kinds:
        config = completed(configs[kind], base)
        module = started_prompt(config, model)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        prompts[kind] = TunedPrompt(base, module, config, manifest)
    values = {kind: tuned.prompt() for kind, tuned in prompts.items()}
    return Served(base, prompts, values)


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.8, "presence_penalty": 0.4},
    {"min_new_tokens": 5, "exponential_decay_length_penalty": (2, 2.5)},
    {"decoding_method": "SAMPLING", "seed": 3, "top_k": 20, "min_p": 0.02},
    {"decoding_method": "SAMPLING", "seed": 4, "top_p": 0.8, "temperature": 0.7},
    {"decoding_method": "SAMPLING", "seed": 5, "typical_p": 0.9},
)


def drawn(rng: random.Random, names: list[str | None]) -> tuple[str | None, tuple[int, ...], Any]:
    """Return a prompt's name, ids and options at random."""
    ids = (1, *(rng.randrange(4, 260) for _ in range(rng.choice([0, 1, 3, 7, 12, 20]))))
    settings = rng.choice(SETTINGS)
    options = (
        GenerationOptions(max_new_tokens=rng.choice([1, 6, 9, 14]), **settings)
        if ("min_new_tokens" not in settings)
        else GenerationOptions(max_new_tokens=10, **settings)
    )
    return rng.choice(names), ids, options
