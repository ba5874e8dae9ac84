"""Prompts on both sides of a seq2seq model: what PEFT's multitask forward computes, trained for real."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

from oracles.families import SEQ2SEQ, build, seq2seq
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from softprompt.backbone import Base, decoder_embedding, input_embedding
from softprompt.engine import build_engine, choose_engine

P = 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ROWS = [
    RowCase((5, 6, 7, 8), (20, 21, 2), 0, 0, 1),
    RowCase((9, 10, 11, 12), (20, 22, 2), 0, 0, 1),
]


@pytest.mark.parametrize("kind", ["plain", "forest"])
@pytest.mark.parametrize("name", only(["t5"], ["t5", "bart", "mt5"]))
def test_against_pefts_two_submodules(name, kind):
    """PEFT's first P rows stand before the encoder's input, the others before the decoder's."""
    import peft

    model = seq2seq(name).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(model),
            peft.MultitaskPromptTuningConfig(
                task_type="SEQ_2_SEQ_LM",
                num_virtual_tokens=P,
                num_transformer_submodules=2,
                num_tasks=2,
                num_ranks=1,
            ),
        ).eval()
    tasks = torch.tensor([1, 1])
    both = theirs.get_prompt(2, task_ids=tasks)[0].detach()
    prompts = [both[:P].clone().requires_grad_(), both[P:].clone().requires_grad_()]
    outputs = build_engine(Base(model), kind).target_outputs(engine_rows(ROWS, prompts))
    labels = torch.tensor([row.target for row in ROWS])
    expected = theirs(
        input_ids=torch.tensor([row.source for row in ROWS]),
        attention_mask=torch.ones(2, 4, dtype=torch.long),
        labels=labels,
        task_ids=tasks,
    )
    torch.testing.assert_close(outputs.logits, expected.logits[:, P:].flatten(0, 1), atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(outputs.logits, outputs.labels)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    ours = torch.autograd.grad(loss, prompts)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


@pytest.mark.parametrize("name", only(["t5"], SEQ2SEQ))
def test_the_models_of_these_tests_run_on_the_forest(name):
    choice = choose_engine(Base(seq2seq(name)))
    assert (choice.name, choice.reason) == ("forest", "")


def test_a_decoder_with_embeddings_of_its_own():
    config = tf.MarianConfig(
        vocab_size=64,
        decoder_vocab_size=64,
        share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    model = build(tf.AutoModelForSeq2SeqLM, config).requires_grad_(False)
    assert decoder_embedding(model) is not input_embedding(model)
    prompts = [torch.randn(P, 32).requires_grad_() for _ in range(2)]
    plain, forest = (
        build_engine(Base(model), kind).target_log_probs(engine_rows(ROWS, prompts)).values
        for kind in ("plain", "forest")
    )
    torch.testing.assert_close(forest, plain, **CLOSE)
    for ours, theirs in zip(
        torch.autograd.grad(forest.sum(), prompts),
        torch.autograd.grad(plain.sum(), prompts),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    decoder = model.get_decoder().get_input_embeddings()
    for row, logits in zip(
        ROWS,
        build_engine(Base(model)).target_outputs(engine_rows(ROWS, prompts)).logits.split(3),
        strict=True,
    ):
        table = input_embedding(model)
        encoded = model.get_encoder()(
            inputs_embeds=torch.cat([prompts[0], table(torch.tensor(row.source))]).unsqueeze(0)
        )
        start = torch.tensor([0, *row.target[:-1]])
        inputs = torch.cat([prompts[1], decoder(start)]).unsqueeze(0)
        expected = model(encoder_outputs=encoded, decoder_inputs_embeds=inputs).logits[0, P:]
        torch.testing.assert_close(logits, expected, **CLOSE)
