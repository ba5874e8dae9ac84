"""lm-evaluation-harness' ``local-completions``: its requests, and what it reads from the answers.

The dialogue is that of lm_eval 0.4.13, which is too heavy to install for a test.
"""

import pytest
import torch

from softprompt import load
from softprompt.engine import EngineRow, PlainEngine

PAIRS = [
    ("Text : My parcel is late Label :", " complaint"),
    ("Text : Thanks", " Label : no complaint"),
]


@pytest.fixture(scope="module")
def engine(base):
    return PlainEngine(base)


def asked(client, model, prompts, **more):
    """Send what the harness sends to score continuations."""
    body = {
        "model": model,
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
        **more,
    }
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return found.json()


def read(answer, starts):
    """Read the sum and whether it is greedy, as the harness does."""
    found = []
    for choice, start in zip(sorted(answer["choices"], key=lambda each: each["index"]), starts, strict=True):
        scores = choice["logprobs"]
        own = scores["token_logprobs"][start:-1]
        top = scores["top_logprobs"][start:-1]
        greedy = all(o == max(t.values()) for o, t in zip(own, top, strict=True))
        found.append((sum(own), greedy))
    return found


@pytest.mark.parametrize("name", ["demo", "writer", "plain-peft"])
def test_continuations_in_a_batch(client, base, shared_prompts, engine, name):
    encode = base.tokenizer.encode
    contexts = [encode(context) for context, _ in PAIRS]
    wholes = [encode(context + more) for context, more in PAIRS]
    prompt = None
    if name != "demo":
        tuned = load(shared_prompts / name, base.model, tokenizer=base.tokenizer)
        prompt = tuned.prompt()
    rows = [
        EngineRow(tuple(whole[: len(context)]), tuple(whole[len(context) :]), prompt)
        for context, whole in zip(contexts, wholes, strict=True)
    ]
    expected = engine.target_log_probs(rows).row_sums(2).tolist()
    answer = asked(client, name, wholes)
    found = read(answer, [len(context) for context in contexts])
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    for choice, whole in zip(answer["choices"], wholes, strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(whole) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None


def test_greedy_is_seen_as_greedy(client, base):
    ids = base.tokenizer.encode("The weather is")
    with torch.no_grad():
        best = int(base.model(torch.tensor([ids])).logits[0, -1].argmax())
    answer = asked(client, "demo", [[*ids, best], [*ids, (best + 1) % 4000]])
    assert [greedy for _, greedy in read(answer, [len(ids)] * 2)] == [True, False]


def test_texts_and_nothing_new(client, base):
    """Newer versions send texts and ask for no new token."""
    text = "".join(PAIRS[0])
    by_ids = asked(client, "demo", [base.tokenizer.encode(text)])
    by_text = asked(client, "demo", [text], max_tokens=0)
    own, other = (each["choices"][0]["logprobs"]["token_logprobs"] for each in (by_ids, by_text))
    assert other[1:] == pytest.approx(own[1:-1], abs=1e-4)
    assert by_text["usage"]["completion_tokens"] == 0
    assert by_text["choices"][0]["text"] == text


def test_generation_until(client, base):
    body = {
        "model": "writer",
        "prompt": ["The weather"],
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n", "</s>"],
        "seed": 1234,
    }
    found = client.post("/v1/completions", json=body).json()
    assert "\n" not in found["choices"][0]["text"]
