"""Requests with one right answer each: what `serving_load.py` asks, and what must come back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import softprompt
from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.artifacts.manifest import Manifest
from softprompt.artifacts.native import save_adapter
from softprompt.attach.saving import state_of
from softprompt.backbone.fingerprint import Fingerprint
from softprompt.backbone.load import LoadedBase
from softprompt.inference.options import GenerationOptions
from softprompt.inference.tuned import TunedPrompt

WORDS = "the kettle broke after one day and nobody answers when I call about my order today".split()
TEMPLATE = "Message: {{input}}\nReply:"
LABELS = ("complaint", "no complaint", "question")


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        path: Where it goes.
        body: What is sent, apart from ``stream``; text is sent as it is.
        answers: The texts that must come back, one for each choice.
        logprobs: Log-probabilities of the first answer's tokens.
        scores: Log-probabilities of labels.
        status: What the server must answer.
    """

    path: str
    body: Mapping[str, Any] | str
    answers: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    status: tuple[int, ...] = (200,)


def prompts_in(root: Path, base: LoadedBase, count: int, virtual: int) -> dict[str, TunedPrompt]:
    """Write prompts of several kinds, and two that are damaged; return the good ones as loaded."""
    manifest = Manifest(
        template=TEMPLATE,
        task="generation",
        labels=None,
        base_model=base.name,
        base_fingerprint=Fingerprint.of(base.model).to_dict(),
        max_source_length=200,
        max_target_length=40,
        dtype="float32",
        seq2seq=False,
    )
    model: Any = base.model
    table = model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(11)
    for i in range(count):
        torch.manual_seed(i)
        config: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        if i % 4 == 3:
            config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        prompted = get_peft_model(model, config)
        values = {
            name: value.detach().clone() for name, value in state_of(prompted, "default").items()
        }
        if i % 4 != 3:
            rows = table[torch.randint(0, len(table), (virtual,), generator=generator)]
            values["prompt_embeddings"] = rows + torch.randn(rows.shape, generator=generator) * 0.3
        prompted.unload()
        save_adapter(root / f"prompt-{i}", config.to_dict(), values, manifest, overwrite=False)
    damaged(root, root / "prompt-0")
    return {
        f"prompt-{i}": softprompt.load(
            root / f"prompt-{i}", base_model=base.model, tokenizer=base.tokenizer
        )
        for i in range(count)
    }


def damaged(root: Path, good: Path) -> None:
    """Write a prompt that is cut short and one whose weights are gone."""
    for name, data in (
        ("cut-short", (good / "adapter_model.safetensors").read_bytes()[:99]),
        ("gone", None),
    ):
        folder = root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
        if data is not None:
            (folder / "adapter_model.safetensors").write_bytes(data)


def good_cases(prompts: Mapping[str, TunedPrompt], base: LoadedBase, each: int) -> list[Case]:
    """Return requests for every prompt and for the base, with the answers each gets alone."""
    rng = random.Random(4)
    cases = []
    for name, tuned in prompts.items():
        for number in range(each):
            text = " ".join(rng.choices(WORDS, k=rng.randint(3, 40)))
            cases.append(generated(name, tuned, text, number, rng))
        text = " ".join(rng.choices(WORDS, k=12))
        scores = tuned.classify([text], LABELS)[0].scores
        body: dict[str, Any] = {"model": name, "input": text, "labels": list(LABELS)}
        cases.append(Case("/v1/classify", body, scores=tuple(scores.items())))
    first = next(iter(prompts.values()))
    for _ in range(each):
        ids = first.sources([" ".join(rng.choices(WORDS, k=rng.randint(3, 40)))])[0][0]
        tokens, logprobs = greedy(base.model, ids, 12, base.tokenizer.eos_token_id)
        body = {"model": base.name, "prompt": list(ids), "max_tokens": 12, "temperature": 0}
        answer = base.tokenizer.decode(tokens, skip_special_tokens=True)
        cases.append(Case("/v1/completions", {**body, "logprobs": 0}, (str(answer),), logprobs))
    return cases


def generated(name: str, tuned: TunedPrompt, text: str, number: int, rng: random.Random) -> Case:
    """Return a request for text: greedy with log-probabilities, sampled, with stops, or penalised."""
    tokens = rng.randint(2, 32)
    body: dict[str, Any] = {"model": name, "prompt": text, "max_tokens": tokens, "temperature": 0}
    settings: dict[str, Any] = {"max_new_tokens": tokens}
    logprobs: tuple[float, ...] = ()
    match number % 4:
        case 0:
            body["logprobs"] = 0
            ids = tuned.sources([text])[0][0]
            found, logprobs = greedy(tuned.model, ids, tokens, tuned.tokenizer.eos_token_id)
            return Case("/v1/completions", body, (tuned.rows.decode(found),), logprobs)
        case 1:
            drawn = {"temperature": 0.8, "top_p": 0.9, "seed": rng.randrange(10**6)}
            body |= drawn
            settings |= {"decoding_method": "SAMPLING", **drawn}
        case 2:
            body["stop"] = [" th", "."]
            settings["stop_sequences"] = (" th", ".")
        case 3:
            body["repetition_penalty"] = settings["repetition_penalty"] = 1.3
    answer = tuned.generate([text], options=GenerationOptions(**settings))[0]
    return Case("/v1/completions", body, (answer.text,))


@torch.no_grad()
def greedy(
    model: Any, ids: Sequence[int], count: int, eos: int
) -> tuple[list[int], tuple[float, ...]]:
    """Return the likeliest tokens and their log-probabilities, each by a whole pass over the row."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < count and eos not in tokens:
        logits = model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, -1]
        scores = logits.float().log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return tokens, tuple(logprobs)


def bad_cases(name: str, base: str) -> list[Case]:
    """Return requests that must be refused, each alone."""
    ask = "/v1/completions"
    return [
        Case(ask, {"model": "nobody", "prompt": "x"}, status=(404,)),
        Case(ask, {"model": "cut-short", "prompt": "x"}, status=(500,)),
        Case(ask, {"model": "gone", "prompt": "x"}, status=(500,)),
        Case(ask, {"model": "../prompt-0", "prompt": "x"}, status=(404,)),
        Case(ask, {"model": name, "prompt": "x", "temperature": "hot"}, status=(400, 422)),
        Case(ask, {"model": name, "prompt": "word " * 3000}, status=(400,)),
        Case(ask, {"model": base, "prompt": [1, 2, 10**9]}, status=(400,)),
        Case(ask, {"model": name, "prompt": "x", "logprobs": 10**6}, status=(400, 422)),
        Case(ask, '{"model": "prompt-0", "prompt": ', status=(400, 422)),
        Case("/v1/classify", {"model": name, "input": "x"}, status=(400,)),
        Case("/v1/classify", {"model": name, "input": "x", "labels": ["a", "a"]}, status=(400,)),
    ]
