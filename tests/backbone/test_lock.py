"""Threads that share a base take turns: each gets the answer it gets alone."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf

from oracles.families import ENCODERS, build, causal, seq2seq
from oracles.naive import padded
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from softprompt import PromptTuningConfig, get_peft_model
from softprompt.backbone import Base, facts_of, vocabulary_of
from softprompt.backbone.state import locked
from softprompt.engine import build_engine

ROWS = [
    RowCase((5, 6, 7, 8), (8, 2), 0),
    RowCase((5, 9), (8, 4, 2), 1),
    RowCase((7, 3, 4), (6,), -1),
]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def hammered(works, times=6):
    """Run every work alone, then all at once; return (alone, [results of each])."""
    alone = [work() for work in works]
    barrier = threading.Barrier(len(works))

    def run(work):
        barrier.wait()
        return [work() for _ in range(times)]

    with ThreadPoolExecutor(len(works)) as pool:
        return alone, [task.result(60) for task in [pool.submit(run, work) for work in works]]


def check(works):
    alone, together = hammered(works)
    for expected, results in zip(alone, together, strict=True):
        for got in results:
            torch.testing.assert_close(got, expected, **CLOSE)


def scored(engine, width, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randn(n, width, generator=generator).requires_grad_() for n in (5, 3)]

    def work():
        values = engine.target_log_probs(engine_rows(ROWS, prompts)).values
        return torch.cat([values.detach(), torch.autograd.grad(values.sum(), prompts[0])[0][0]])

    return work


def prompted(model, task, seed):
    torch.manual_seed(seed)
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=4)
    return get_peft_model(model, config, adapter_name=f"p{seed}").eval()


@pytest.mark.parametrize(
    ("name", "task"), only([("llama", "CAUSAL_LM")], [("llama", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM")])
)
def test_forward_generate_and_engines_at_once(name, task):
    model = (causal if task == "CAUSAL_LM" else seq2seq)(name).requires_grad_(False)
    width = facts_of(model).token_dim
    ids, mask = padded([[5, 6, 7, 8, 2], [11, 2]], "left" if task == "CAUSAL_LM" else "right")
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task != "CAUSAL_LM":
        inputs["decoder_input_ids"] = ids
    models = [prompted(model, task, seed) for seed in range(3)]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    kinds = ["forest", "plain"] + (["expand"] if task == "CAUSAL_LM" else [])
    check(
        [
            lambda: models[0](**inputs).logits,
            lambda: models[1].generate(input_ids=ids, attention_mask=mask, **options),
            lambda: models[2](**inputs).logits,
            *(scored(build_engine(Base(model), kind), width, i) for i, kind in enumerate(kinds)),
        ]
    )


def test_packed_encoders_at_once():
    model = build(tf.AutoModelForSequenceClassification, ENCODERS["bert"](), num_labels=3)
    ids, mask = padded([[5, 6, 7, 8, 2], [11, 2]], "right")
    models = [prompted(model, "SEQ_CLS", seed) for seed in range(3)]

    def work_of(each):
        def work():
            return each(input_ids=ids, attention_mask=mask).logits

        return work

    check([work_of(each) for each in models])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointed_steps_at_once():
    """Backward runs layers again while others run theirs."""
    model = causal("llama").requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    engines = [build_engine(Base(model), kind) for kind in ("forest", "plain", "forest")]
    check([scored(engine, facts_of(model).token_dim, i) for i, engine in enumerate(engines)])


def test_rows_are_lent_to_one_thread():
    """The bare base in another thread does not see them."""
    model = causal("gpt2")
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    vocabulary = vocabulary_of(model)
    with vocabulary.inject(torch.ones(2, facts_of(model).token_dim)), ThreadPoolExecutor(1) as pool:
        vocabulary.before(model.get_input_embeddings(), (torch.tensor([[64]]),))
        assert torch.equal(pool.submit(lambda: model(ids).logits).result(60), expected)
        with pytest.raises(IndexError):
            pool.submit(lambda: model(torch.tensor([[64]]))).result(60)
    vocabulary.remove()


def test_one_lock_a_model_shared_by_its_parts_and_never_copied():
    model = causal("llama")
    assert locked(model) is locked(model.base_model)
    with locked(model), locked(model.base_model):  # re-entrant
        other = copy.deepcopy(model)
    assert locked(other) is not locked(model)


def test_a_new_embedding_leaves_the_lock():
    model = causal("llama")
    lock = locked(model)
    model.resize_token_embeddings(70)
    assert locked(model) is lock
    assert locked(model.base_model) is lock


def test_tasks_that_share_a_part_share_its_lock():
    model = causal("llama")
    other = tf.LlamaForCausalLM(model.config)
    other.model = model.model
    assert locked(other.model) is locked(other)
    assert locked(model) is locked(other)
