"""Requests with one right answer each: what `serving_load.py` asks, and what must come back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import softprompt
from softprompt import (
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from softprompt.artifacts import Manifest, save_adapter
from softprompt.backbone import Base, Fingerprint
from softprompt.generation import GenerationOptions
from softprompt.inference import TunedPrompt

WORDS = "the kettle broke after one day and nobody answers when I call about my order today".split()
TEMPLATE = "Message: {{input}}\nReply:"
ASK = "/v1/completions"
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
        others: The same request to other versions of its prompt; the answer of any will do.
    """

    path: str
    body: Mapping[str, Any] | str
    answers: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    status: tuple[int, ...] = (200,)
    others: tuple[Case, ...] = ()

    @property
    def streams(self) -> bool:
        """Whether the answer can be asked for as a stream."""
        return self.path == ASK and 200 in self.status


def prompts_in(root: Path, base: Base, count: int, virtual: int) -> dict[str, TunedPrompt]:
    """Write prompts of several kinds, and two that are damaged; return the good ones as loaded."""
    folders = [root / f"prompt-{i}" for i in range(count)]
    for i, folder in enumerate(folders):
        write_prompt(folder, base, virtual, seed=i, prefix=i % 4 == 3)
    damaged(root, root / "prompt-0")
    return {folder.name: loaded(folder, base) for folder in folders}


def write_prompt(folder: Path, base: Base, virtual: int, *, seed: int, prefix: bool = False) -> None:
    """Write a prompt of random rows near the base's embeddings, or of keys and values."""
    model: Any = base.model
    table = model.get_input_embeddings().weight.detach()
    torch.manual_seed(seed)
    kind = PrefixTuningConfig if prefix else PromptTuningConfig
    config: Any = kind(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    prompted = get_peft_model(model, config)
    values = get_peft_model_state_dict(prompted)
    if not prefix:
        rows = table[torch.randint(0, len(table), (virtual,))]
        values["prompt_embeddings"] = rows + torch.randn(rows.shape) * 0.3
    prompted.detach()
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
    save_adapter(folder, config.to_dict(), values, manifest, overwrite=False)


def loaded(folder: Path, base: Base) -> TunedPrompt:
    """Read a prompt back onto the base."""
    return softprompt.load(folder, base_model=base.model, tokenizer=base.tokenizer)


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


def good_cases(prompts: Mapping[str, TunedPrompt], base: Base, each: int) -> list[Case]:
    """Return requests for every prompt and for the base, with the answers each gets alone."""
    rng = random.Random(4)
    cases = []
    for name, tuned in prompts.items():
        for number in range(each):
            cases.append(generated(name, tuned, text_of(rng, 3, 40), number, rng))
        cases.append(scored(name, tuned, text_of(rng, 12, 12)))
    first = next(iter(prompts.values()))
    for _ in range(each):
        ids = first.sources([text_of(rng, 3, 40)])[0][0]
        tokens, logprobs = greedy(base.model, ids, 12, base.tokenizer.eos_token_id)
        body = {"model": base.name, "prompt": list(ids), "max_tokens": 12, "temperature": 0}
        answer = base.tokenizer.decode(tokens, skip_special_tokens=True)
        cases.append(Case(ASK, {**body, "logprobs": 0}, (str(answer),), logprobs))
    return cases


def changing_cases(name: str, versions: Sequence[TunedPrompt], each: int) -> list[Case]:
    """Return requests for a prompt whose files change under it: any version's answer is right."""
    found = []
    for number in range(each):
        text = text_of(random.Random(number), 3, 40)
        # The same draws for each version make the same bodies.
        found.append([generated(name, v, text, number, random.Random(number)) for v in versions])
    text = text_of(random.Random(each), 12, 12)
    found.append([scored(name, version, text) for version in versions])
    return [replace(same[0], status=(200, 404, 500), others=tuple(same[1:])) for same in found]


def crowd_case(name: str, tuned: TunedPrompt, texts: int) -> Case:
    """Return one request for several texts; many of them at once fill a queue."""
    rng = random.Random(5)
    prompt = [text_of(rng, 3, 20) for _ in range(texts)]
    options = GenerationOptions(max_new_tokens=8)
    answers = tuple(tuned.generate([text], options=options)[0].text for text in prompt)
    body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return Case(ASK, body, answers, status=(200, 429))


def text_of(rng: random.Random, least: int, most: int) -> str:
    """Return some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def scored(name: str, tuned: TunedPrompt, text: str) -> Case:
    """Return a request for the labels of a text."""
    scores = tuned.classify([text], LABELS)[0].scores
    body: dict[str, Any] = {"model": name, "input": text, "labels": list(LABELS)}
    return Case("/v1/classify", body, scores=tuple(scores.items()))


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
            prompted = PeftModel.of(tuned)
            found, logprobs = greedy(prompted, ids, tokens, tuned.tokenizer.eos_token_id)
            prompted.detach()
            return Case(ASK, body, (tuned.rows.decode(found),), logprobs)
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
    return Case(ASK, body, (answer.text,))


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], count: int, eos: int) -> tuple[list[int], tuple[float, ...]]:
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
    ok: dict[str, Any] = {"model": name, "prompt": "x"}
    wrong: list[dict[str, Any]] = [
        {"temperature": "hot"},
        {"temperature": True},
        {"logprobs": 10**6},
        {"max_tokens": [5]},
        {"stop": {"text": "."}},
        {"prompt": {"tensor": [0.5]}},
        {"prompt": ["x", 1]},
        {"prompt": "word " * 3000},
        {"prompt": "x", "prompt_embeds": "AAAA"},
        {"stream": "yes"},
        {"n": 10**9},
        {"model": base, "prompt": [1, 2, 10**9]},
    ]
    broken = [
        '{"model": "prompt-0", "prompt": ',
        "",
        "null",
        "[" * 50_000,
        '{"model": "prompt-0", "prompt": "x", "temperature": NaN}',
        '{"model": "prompt-0", "prompt": "\\ud800"}',
    ]
    return [
        *(Case(ASK, {**ok, "model": lost}, status=(404,)) for lost in ("nobody", "../prompt-0")),
        *(Case(ASK, {**ok, "model": bad}, status=(500,)) for bad in ("cut-short", "gone")),
        *(Case(ASK, {**ok, **change}, status=(400,)) for change in wrong),
        *(Case(ASK, text, status=(400,)) for text in broken),
        Case("/v1/classify", {"model": name, "input": "x"}, status=(400,)),
        Case("/v1/classify", {"model": name, "input": "x", "labels": ["a", "a"]}, status=(400,)),
    ]
