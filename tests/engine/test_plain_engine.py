"""The plain engine against one row at a time, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from oracles.families import causal, seq2seq
from oracles.naive import solo_logits
from oracles.rows import RowCase, engine_rows
from oracles.slow import only
from oracles.weights import weights_hash
from softprompt.backbone import Base, freeze, input_embedding
from softprompt.engine import PlainEngine, build_engine, text_states
from softprompt.errors import ConfigError, ContextOverflowError, DataError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CAUSAL = ["gpt2", "llama", "mistral", "qwen3", "gemma3", "opt", "bloom", "gpt_neo", "phi"]
SEQ2SEQ = ["t5", "bart"]
ROWS = [
    RowCase((5, 6, 7, 8, 9, 10, 11, 12, 13), (20, 2), 0),
    RowCase((14,), (21, 22, 23, 2), 1),
    RowCase((15, 16, 17), (24, 2), -1),
    RowCase((18, 19, 30), (2,), 0),
]
EMPTY_SOURCE = RowCase((), (25, 26, 2), 1)
"""A prompt stands before the answer, so an empty input is no hindrance."""


def base(name):
    model = seq2seq(name) if name in SEQ2SEQ else causal(name)
    freeze(model)
    return model


def prompts_for(model, lengths=(6, 3)):
    generator = torch.Generator().manual_seed(4)
    width = input_embedding(model).weight.shape[1]
    return [torch.randn(n, width, generator=generator).mul(0.3).requires_grad_() for n in lengths]


def solo(model, row, prompts):
    """Return log p of one row's target tokens, by hand."""
    prompt = prompts[row.prompt] if row.prompt >= 0 else None
    target = torch.tensor(row.target)
    if model.config.is_encoder_decoder:
        embeds = input_embedding(model)(torch.tensor([row.source], dtype=torch.long))
        if prompt is not None:
            embeds = torch.cat([prompt.unsqueeze(0), embeds], dim=1)
        encoded = model.get_encoder()(inputs_embeds=embeds)
        logits = model(encoder_outputs=encoded, labels=target.unsqueeze(0)).logits[0]
    else:
        prefix = prompt if row.prompt >= 0 else None
        whole = torch.tensor(row.source + row.target)
        before = solo_logits(model, prefix, whole)
        if row.source:
            logits = before[len(row.source) - 1 : -1]
        else:
            rows = torch.cat([prefix, input_embedding(model)(whole)]).unsqueeze(0)
            logits = model(inputs_embeds=rows).logits[0, len(prefix) - 1 : -1]
    return -F.cross_entropy(logits.float(), target, reduction="none")


def gradients(values, prompts):
    return torch.autograd.grad((values * torch.arange(1, len(values) + 1)).sum(), prompts)


@pytest.mark.parametrize("name", only(["gpt2", "llama", "gemma3", "bloom", "t5"], [*CAUSAL, *SEQ2SEQ]))
def test_values_and_gradients_against_one_row_at_a_time(name):
    model = base(name)
    rows = ROWS if name in SEQ2SEQ else [*ROWS, EMPTY_SOURCE]
    prompts = prompts_for(model)
    scored = PlainEngine(Base(model)).target_log_probs(engine_rows(rows, prompts))
    expected = torch.cat([solo(model, row, prompts) for row in rows])
    torch.testing.assert_close(scored.values, expected, **CLOSE)
    assert scored.values.dtype is torch.float32
    index = [i for i, row in enumerate(rows) for _ in row.target]
    assert scored.row_index.tolist() == index
    sums = [expected[torch.tensor(index) == i].sum() for i in range(len(rows))]
    torch.testing.assert_close(scored.row_sums(len(rows)), torch.stack(sums), **CLOSE)
    ours, theirs = gradients(scored.values, prompts), gradients(expected, prompts)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, **CLOSE)
        assert mine.abs().sum() > 0


@pytest.mark.parametrize("kind", ["plain", "expand", "states"])
def test_the_head_reads_the_columns_of_the_answers_in_one_piece(kind, monkeypatch):
    """Others torch multiplies row after row by a frozen head: 17 times as long for 80 rows of three."""
    given = Base(causal("llama"))
    cases, taken = [RowCase((5, 6, 7, 8), (9, 10), 0), RowCase((5, 6), (7, 8, 9), 1)], []
    rows, product = engine_rows(cases, prompts_for(given.model)), given.model.lm_head.forward
    run = text_states if kind == "states" else lambda base, rows: build_engine(base, kind).target_log_probs(rows)
    run(given, rows)  # probes
    monkeypatch.setattr(given.model.lm_head, "forward", lambda states: taken.append(states) or product(states))
    run(given, rows)
    assert taken and all(states.is_contiguous() and len(states) == 2 for states in taken)


@pytest.mark.parametrize("name", only(["llama", "t5"], ["llama", "gpt2", "t5"]))
def test_each_prompt_learns_from_its_own_rows(name):
    model = base(name)
    prompts = prompts_for(model)
    engine = PlainEngine(Base(model))
    both = engine.target_log_probs(engine_rows(ROWS, prompts))
    whole = torch.autograd.grad(both.values.sum(), prompts)
    for index, prompt in enumerate(prompts):
        own = [RowCase(row.source, row.target) for row in ROWS if row.prompt == index]
        alone = engine.target_log_probs(engine_rows(own, [prompt]))
        (gradient,) = torch.autograd.grad(alone.values.sum(), [prompt])
        torch.testing.assert_close(whole[index], gradient, **CLOSE)


def test_an_unused_prompt_gets_no_gradient():
    model = base("llama")
    prompts = prompts_for(model)
    engine = PlainEngine(Base(model))
    engine.target_log_probs(engine_rows(ROWS[:1], prompts)).values.sum().backward()
    assert prompts[0].grad is not None
    assert prompts[1].grad is None


@pytest.mark.parametrize("name", only(["llama", "t5"], ["llama", "gpt2", "bloom", "t5", "bart"]))
def test_the_order_and_the_company_of_rows_do_not_matter(name):
    model = base(name)
    prompts = prompts_for(model)
    engine = PlainEngine(Base(model))
    with torch.no_grad():
        sums = engine.target_log_probs(engine_rows(ROWS, prompts)).row_sums(4)
        order = [2, 0, 3, 1]
        permuted = engine.target_log_probs(engine_rows([ROWS[i] for i in order], prompts)).row_sums(4)
        torch.testing.assert_close(permuted, sums[order], **CLOSE)
        parts = [engine.target_log_probs(engine_rows(ROWS[s], prompts)) for s in (slice(0, 1), slice(1, 4))]
        split = torch.cat([part.row_sums(n) for part, n in zip(parts, (1, 3), strict=True)])
        torch.testing.assert_close(split, sums, **CLOSE)


@pytest.mark.parametrize("kind", only(["auto"], ["plain", "auto"]))
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_without_any_prompt(name, kind):
    model = base(name)
    rows = [RowCase(row.source, row.target, -1) for row in ROWS]
    scored = build_engine(Base(model), kind).target_log_probs(engine_rows(rows, []))
    expected = torch.cat([solo(model, row, []) for row in rows])
    torch.testing.assert_close(scored.values, expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_nothing_before_an_answer_is_refused(name):
    model = base(name)
    with pytest.raises(DataError, match="row 1 has an empty input and no prompt") as caught:
        PlainEngine(Base(model)).target_log_probs(
            engine_rows([ROWS[0], RowCase((), (5, 2), -1)], prompts_for(model))
        )
    assert "\n" not in str(caught.value)


def test_an_empty_input_behind_a_prompt_works_for_seq2seq():
    model = base("t5")
    prompts = prompts_for(model)
    scored = PlainEngine(Base(model)).target_log_probs(engine_rows([EMPTY_SOURCE, ROWS[0]], prompts))
    expected = torch.cat([solo(model, row, prompts) for row in (EMPTY_SOURCE, ROWS[0])])
    torch.testing.assert_close(scored.values, expected, **CLOSE)


def test_the_context_is_checked_with_the_answer():
    model = base("llama")
    prompts = prompts_for(model)
    engine = PlainEngine(Base(model))
    fits = RowCase(tuple([5] * 56), (6, 2), 0)
    assert engine.target_log_probs(engine_rows([fits], prompts)).values.shape == (2,)
    with pytest.raises(ContextOverflowError, match=r"^59 \+ 6 virtual tokens exceed the model's 64"):
        engine.target_log_probs(engine_rows([ROWS[0], RowCase(tuple([5] * 57), (6, 2), 0)], prompts))


def test_the_decoder_of_a_seq2seq_has_its_own_context():
    model = base("bart")
    prompts = prompts_for(model)
    engine = PlainEngine(Base(model))
    engine.target_log_probs(engine_rows([RowCase(tuple([5] * 58), tuple([6] * 64), 0)], prompts))
    with pytest.raises(ContextOverflowError, match="exceed the model's 64"):
        engine.target_log_probs(engine_rows([RowCase(tuple([5] * 59), (6,), 0)], prompts))
    with pytest.raises(ContextOverflowError, match="exceed the decoder's 64"):
        engine.target_log_probs(engine_rows([RowCase((5,), tuple([6] * 65), 0)], prompts))


def test_the_base_is_left_as_it_was():
    model = base("llama")
    before, ids = weights_hash(model), torch.tensor([[5, 6, 7]])
    logits = model(ids).logits
    prompts = prompts_for(model)
    PlainEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts)).values.sum().backward()
    with pytest.raises(ContextOverflowError):
        PlainEngine(Base(model)).target_log_probs(engine_rows([RowCase(tuple([5] * 90), (2,), 0)], prompts))
    assert weights_hash(model) == before
    assert torch.equal(model(ids).logits, logits)
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_engine_works_on_a_base_that_carries_prompts():
    from softprompt import PromptTuningConfig, get_peft_model

    model = base("llama")
    prompts = prompts_for(model)
    expected = PlainEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts)).values
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert torch.equal(
        PlainEngine(Base(prompted.get_base_model())).target_log_probs(engine_rows(ROWS, prompts)).values,
        expected,
    )


def test_a_bfloat16_base_with_float32_prompts():
    model = base("llama").to(torch.bfloat16)
    prompts = prompts_for(model)
    scored = PlainEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts))
    assert scored.values.dtype is torch.float32
    scored.values.sum().backward()
    assert prompts[0].grad.dtype is torch.float32


def test_engines_go_by_name():
    model = base("llama")
    assert build_engine(Base(model), "plain").name == "plain"
    assert build_engine(Base(model)).target_log_probs(engine_rows(ROWS, prompts_for(model))).values.shape == (9,)
    with pytest.raises(ConfigError, match=r"got 'plian' \(did you mean 'plain'\?\)"):
        build_engine(Base(model), "plian")
