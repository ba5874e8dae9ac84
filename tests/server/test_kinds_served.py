"""Prompts of every kind, on bases of every kind, answer over HTTP as each does alone."""

import copy
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers as tf

import softprompt
from oracles import families
from oracles.served import VOCABULARY
from oracles.serving import app_over, running
from oracles.slow import only
from oracles.tokenizers import byte_bpe
from softprompt import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from softprompt.artifacts import Manifest
from softprompt.backbone import Base, Fingerprint
from softprompt.inference import TunedPrompt

TEXTS = ["is it good or bad", "the parcel", "thank you, great service; it is late again"]
LABELS = ["good", "bad", "late again"]
KINDS = {
    "rows": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=4),
    "suffix": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3, placement="suffix"),
    "after-bos": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3, placement="after_bos"),
    "low-rank": lambda task: PromptTuningConfig(
        task_type=task, num_virtual_tokens=4, parameterization="low_rank", parameterization_rank=2
    ),
    "prefix": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=5),
    "cartridge": lambda task: CartridgeConfig(task_type=task, num_virtual_tokens=5, num_frozen_tokens=2),
    "p-tuning": lambda task: PromptEncoderConfig(task_type=task, num_virtual_tokens=4, encoder_hidden_size=8),
    "cpt": lambda task: CPTConfig(
        task_type=task,
        cpt_token_ids=[260, 261, 262],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 2],
    ),
    "multitask": lambda task: MultitaskPromptTuningConfig(
        task_type=task, num_virtual_tokens=3, num_tasks=2, num_ranks=1
    ),
    "decoder": lambda task: PromptTuningConfig(
        task_type=task, num_virtual_tokens=3, output_model_types=["DECODER"]
    ),
    "both": lambda task: PromptTuningConfig(
        task_type=task, num_virtual_tokens=3, output_model_types=["ENCODER", "DECODER"]
    ),
    "unseeing": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3, prompt_sees_input=False),
}
CAUSAL = (
    "rows",
    "suffix",
    "after-bos",
    "low-rank",
    "prefix",
    "cartridge",
    "p-tuning",
    "cpt",
    "multitask",
)
SEQ2SEQ = (
    "rows",
    "suffix",
    "prefix",
    "cartridge",
    "p-tuning",
    "multitask",
    "decoder",
    "both",
    "unseeing",
)
BASES = {
    "llama": CAUSAL,
    "gpt2": ("rows", "prefix", "suffix", "multitask"),
    "bloom": ("rows", "suffix", "prefix", "multitask"),
    "mamba": ("rows", "suffix", "multitask"),
    "bart": SEQ2SEQ,
    "t5": ("rows", "both", "prefix", "multitask"),
}
FOREST = ("llama", "gpt2")


class Kept:
    """A base whose prompts are served, and the same prompts read back one by one."""

    def __init__(self, name, root):
        self.name = name
        self.loaded = Base(_model(name), byte_bpe(bos=name not in families.SEQ2SEQ), "tiny")
        for seed, kind in enumerate(BASES[name]):
            _write(root / kind, self.loaded, kind, seed)
        self.alone = {
            kind: softprompt.load(root / kind, copy.deepcopy(self.loaded.model), tokenizer=self.loaded.tokenizer)
            for kind in BASES[name]
        }


def _model(name):
    if name != "mamba":
        return families.tiny(name, vocab_size=VOCABULARY)
    config = tf.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        tie_word_embeddings=False,
        **families.IDS,
    )
    return families.build(tf.AutoModelForCausalLM, config).requires_grad_(False)


def _write(folder, base, kind, seed):
    seq2seq = base.model.config.is_encoder_decoder
    config = KINDS[kind]("SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base.model), config, adapter_name=kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.encoder_of(kind).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    record = Manifest(
        template="{{input}} :",
        task="generation",
        labels=None,
        base_model=base.name,
        base_fingerprint=Fingerprint.of(base.model).to_dict(),
        max_source_length=48,
        max_target_length=16,
        dtype="float32",
        seq2seq=seq2seq,
    )
    if kind == "multitask":
        asks = {"labels": None, "task": "generation", "template": "{{input}} ?"}
        tells = {"labels": LABELS, "task": "classification", "template": "{{input}} !"}
        record = replace(record, tasks=("ask", "tell"), data={"tasks": {"ask": asks, "tell": tells}})
    TunedPrompt(base, model.encoder_of(kind), model.peft_config[kind], record).save(folder)


@pytest.fixture(scope="module", params=only(["gpt2", "mamba", "t5"], BASES))
def kept(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    found = Kept(request.param, root)
    with running(app_over(found.loaded, root)) as server, server.client() as client:
        found.client = client
        yield found


def asked(kind, text, task=None, **more):
    named = {} if task is None else {"task": task}
    return {"model": kind, "prompt": text, "max_tokens": 6, **named, **more}


def answered(client, body):
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return [choice["text"] for choice in found.json()["choices"]]


def streamed(client, body):
    found = client.post("/v1/completions", json={**body, "stream": True})
    events = [each.removeprefix("data: ") for each in found.text.strip().split("\n\n")]
    assert events.pop() == "[DONE]", found.text
    return ["".join(json.loads(event)["choices"][0]["text"] for event in events)]


def tasks_of(kind):
    return ("ask", "tell") if kind == "multitask" else (None,)


def requests_of(kept):
    """Return every request with the answer of the prompt alone: greedy, penalised, drawn."""
    greedy = {"temperature": 0}
    for kind, tuned in kept.alone.items():
        for task in tasks_of(kind):
            for text in TEXTS:
                alone = tuned.generate([text], task_name=task, max_new_tokens=6)
                yield asked(kind, text, task, **greedy), [alone[0].text]
            pressed = {"repetition_penalty": 1.4, "exponential_decay_length_penalty": (2, 2.0)}
            alone = tuned.generate([TEXTS[0]], task_name=task, max_new_tokens=6, **pressed)
            yield asked(kind, TEXTS[0], task, **greedy, **pressed), [alone[0].text]
            drawn = {"top_p": 0.9, "seed": 5, "temperature": 0.7}
            alone = tuned.generate(
                [TEXTS[1]],
                task_name=task,
                max_new_tokens=6,
                decoding_method="SAMPLING",
                **drawn,
            )
            yield asked(kind, TEXTS[1], task, **drawn), [alone[0].text]


def test_every_kind_answers_as_alone(kept):
    """All at once, whole and streamed, in an order of their own."""
    todo = [(how, body, alone) for body, alone in requests_of(kept) for how in (answered, streamed)]
    random.Random(3).shuffle(todo)
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda each: each[0](kept.client, each[1]), todo))
    for (_, body, alone), texts in zip(todo, found, strict=True):
        assert texts == alone, body
    assert len({tuple(texts) for texts in found}) > 2


def test_token_ids_are_answered_as_the_text_they_are(kept):
    """The prompt stands at its place among ids that no template has put, or in front of those without a BOS."""
    for kind in kept.alone.keys() & {"rows", "suffix", "after-bos"}:
        (ids,), _ = kept.alone[kind].sources(TEXTS[:1])
        text = asked(kind, TEXTS[0], temperature=0)
        told = [
            kept.client.post("/v1/completions", json=text | each).json() for each in ({}, {"prompt": list(ids)})
        ]
        assert told[0]["choices"][0]["text"].strip() == told[1]["choices"][0]["text"].strip(), kind
        assert told[0]["usage"] == told[1]["usage"]


def test_every_kind_classifies_as_alone(kept):
    seen = set()
    for kind, tuned in kept.alone.items():
        for task in tasks_of(kind):
            expected = tuned.classify(TEXTS, LABELS, task_name=task)
            named = {} if task is None else {"task": task}
            body = {"model": kind, "input": TEXTS, "labels": LABELS, **named}
            found = kept.client.post("/v1/classify", json=body)
            assert found.status_code == 200, (kind, found.text)
            for row, own in zip(found.json()["data"], expected, strict=True):
                assert row["scores"] == pytest.approx(dict(own.scores), abs=1e-4), kind
            seen.add(tuple(round(own.scores["good"], 3) for own in expected))
    assert len(seen) == len(kept.alone) + 1  # the two tasks of one prompt differ as well


def test_models_say_which_engine_it_is(kept):
    data = kept.client.get("/v1/models").json()["data"]
    assert {each["id"] for each in data} == {"tiny", *BASES[kept.name]}
    for each in data:
        assert each["engine"] == ("forest" if kept.name in FOREST else "simple")
        assert bool(each["engine_reason"]) == (kept.name not in FOREST)
        tasks = [task["name"] for task in each.get("tasks") or ()]
        assert tasks == (["ask", "tell"] if each["id"] == "multitask" else [])


def test_tasks_that_are_none(kept):
    for task, words in ((None, "2 tasks (ask, tell)"), ("tel", "did you mean 'tell'"), (2, "2")):
        body = asked("multitask", TEXTS[0], task)
        found = kept.client.post("/v1/completions", json=body)
        assert found.status_code == 400
        assert words in found.json()["error"]["message"]
    own = kept.client.post("/v1/classify", json={"model": "multitask", "input": TEXTS[0], "task": "tell"})
    assert list(own.json()["data"][0]["scores"]) == LABELS
