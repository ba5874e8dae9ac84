"""What the decode forest must show before a model is served by it.

Rows of unlike lengths, under prompts of both kinds and under none, join at different passes, read
in parts, and one leaves in between; their log-probabilities are compared with each row alone on
the plain path.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

from softprompt.backbone import Base, torch_products
from softprompt.engine.decode.forest import DecodeForest, NewTokens
from softprompt.engine.decode.store import Lane
from softprompt.engine.plain import PlainEngine
from softprompt.engine.rows import EngineRow
from softprompt.engine.selfcheck import probing
from softprompt.errors import SoftPromptError
from softprompt.prompts import Prompt

logger = logging.getLogger(__name__)

_LENGTHS = (6, 11, 3, 8)
"""Tokens of each probe row: behind virtual tokens, none, keys and values, and virtual tokens again."""

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


def why_undecodable(base: Base) -> str:
    """Return why the decode forest cannot serve a model, empty when it can; remembered per model."""
    found, name = base.found, "decoding"
    if name not in found:
        try:
            with probing(base), torch.no_grad():
                found[name] = _difference(base)
        except Exception as cause:  # whatever a model's own code raises on our inputs
            first = (str(cause).strip().splitlines() or [""])[0]
            own = isinstance(cause, SoftPromptError)
            found[name] = first if own else f"{type(cause).__name__}: {first}"
        if found[name]:
            logger.info("no decode forest for %s (%s)", base.facts.architecture, found[name])
    return cast(str, found[name])


def _difference(base: Base) -> str:
    forest = DecodeForest(base, 4096, ordered_weights=False)
    facts, shape = base.facts, base.key_value_shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(base.device)

    virtual = drawn(4, facts.token_dim) * facts.embedding_rms
    prefix = drawn(shape.layers, 2, shape.heads, 3, shape.width)
    prompts = [Prompt(virtual), None, Prompt(prefix=prefix), Prompt(virtual.flip(0))]
    top = min(facts.vocabulary, 1000)
    texts = [torch.randint(0, top, (n,), generator=generator).tolist() for n in _LENGTHS]
    got = _run(forest, texts, prompts, facts.vocabulary)
    plain = PlainEngine(base)
    worst = 0.0
    for text, prompt, logs in zip(texts, prompts, got, strict=True):
        row = EngineRow(tuple(text[:1]), tuple(text[1:]), prompt)
        with torch_products():
            expected = plain.target_log_probs([row]).values
        worst = max(worst, float((logs - expected).abs().max()))
    if worst <= _TOLERANCE.get(base.dtype, 1e-4):
        return ""
    return f"its log-probabilities differ by {worst:.2g} on the probe"


def _run(
    forest: DecodeForest, texts: list[list[int]], prompts: list[Prompt | None], vocabulary: int
) -> list[Tensor]:
    """Return log p of every token but the first of each text behind its prompt."""
    visitor = forest.store.take(8)
    assert visitor is not None
    forest.step([NewTokens(visitor[0], (1, 2))])
    lanes: list[Lane] = []
    left: list[list[int]] = []
    for text, prompt in zip(texts, prompts, strict=True):
        lanes += forest.store.take(len(text) + 8) or []
        if prompt is not None and prompt.prefix is not None:
            forest.store.fill(lanes[-1], forest.store.converted(prompt.prefix))
        virtual = 0 if prompt is None else prompt.input_tokens
        left.append([*range(vocabulary, vocabulary + virtual), *text])
    logits: list[list[Tensor]] = [[] for _ in texts]
    passed = 0
    while any(left):
        if passed == 2:
            forest.store.release(visitor[0])
        # Row i joins at pass i, and reads 1, 2, 3 or 4 tokens at a time.
        running = [i for i in range(min(len(texts), passed + 1)) if left[i]]
        news = []
        for i in running:
            ids, left[i] = tuple(left[i][: i + 1]), left[i][i + 1 :]
            prompt = prompts[i]
            news.append(NewTokens(lanes[i], ids, None if prompt is None else prompt.input, "all"))
        for i, part in zip(running, forest.step(news), strict=True):
            logits[i].append(part)
        passed += 1
    found = []
    for text, parts in zip(texts, logits, strict=True):
        logs = torch.cat(parts)[-len(text) : -1].log_softmax(-1)
        labels = torch.tensor(text[1:], device=logs.device).unsqueeze(1)
        found.append(logs.gather(1, labels)[:, 0])
    return found
