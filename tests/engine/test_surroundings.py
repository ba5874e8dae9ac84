"""What surrounds a pass: the caller's modes, other parts of the model, inputs that cannot be run."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers as tf

from oracles.families import ENCODERS, GQA, IDS, H, L, V, build, causal, seq2seq
from oracles.naive import padded
from oracles.rows import RowCase, engine_rows
from softprompt import PromptTuningConfig, get_peft_model
from softprompt.backbone import Base, facts_of
from softprompt.engine import ForestEngine, PlainEngine, build_engine, choose_engine
from softprompt.errors import ConfigError, DataError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ROWS = [RowCase((5, 6, 7, 8, 9, 10, 11), (8, 2), 0), RowCase((5, 9), (8, 4, 2), 1)]


def prompts_for(model, *lengths):
    generator = torch.Generator().manual_seed(4)
    width = facts_of(model).token_dim
    return [torch.randn(n, width, generator=generator).requires_grad_() for n in lengths]


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, autocast])
def test_the_choice_does_not_depend_on_the_callers_mode(mode):
    model = causal("llama", seed=3)
    with mode():
        assert choose_engine(Base(model)).name == "forest"


def test_the_probe_leaves_every_module_in_its_own_mode():
    model = causal("gpt2", seed=3).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    choose_engine(Base(model))
    assert [module.training for module in model.modules()] == before


def test_parts_keep_their_own_attention_implementation():
    config = tf.Gemma3Config(
        text_config={**GQA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    model = tf.Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    ForestEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts_for(model, 5, 3)))
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        tf.RwkvConfig(
            vocab_size=V,
            hidden_size=H,
            num_hidden_layers=L,
            attention_hidden_size=H,
            intermediate_size=48,
            **IDS,
        ),
        pytest.param(
            tf.RecurrentGemmaConfig(
                **GQA, lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rwkv", "recurrent_gemma"],
)
def test_models_that_padding_disturbs_run_row_by_row(config):
    model = build(tf.AutoModelForCausalLM, config).requires_grad_(False)
    prompts = prompts_for(model, 5, 3)
    choice = choose_engine(Base(model))
    assert choice.name == "plain" and "row by row" in choice.reason
    raw = PlainEngine(Base(model), trusted=True)
    alone = torch.cat([raw.target_log_probs(engine_rows([row], prompts)).values for row in ROWS])
    got = build_engine(Base(model)).target_log_probs(engine_rows(ROWS, prompts)).values
    torch.testing.assert_close(got, alone, **CLOSE)
    assert (raw.target_log_probs(engine_rows(ROWS, prompts)).values - alone).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["plain", "expand", "forest"])
def test_ids_that_are_no_tokens_are_refused(kind):
    """From V on they would mean prompt rows, without a word."""
    model = causal("llama").requires_grad_(False)
    engine = build_engine(Base(model), kind)
    for row in (RowCase((5, V + 1), (7, 2)), RowCase((5,), (V, 2))):
        with pytest.raises(DataError, match=r"row 0 holds the id 6[45], but the model has 64"):
            engine.target_log_probs(engine_rows([row], prompts_for(model, 3)))


@pytest.mark.parametrize("kind", ["plain", "expand", "forest"])
def test_a_resized_table_is_noticed(kind):
    model = causal("llama").requires_grad_(False)
    engine = build_engine(Base(model), kind)
    model.resize_token_embeddings(V + 16)
    with pytest.raises(ConfigError, match="had 64 rows when the engine was built, now it has 80"):
        engine.target_log_probs(engine_rows(ROWS, prompts_for(model, 5, 3)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("llama", "plain", marks=pytest.mark.slow),
        pytest.param("llama", "expand", marks=pytest.mark.slow),
        ("llama", "forest"),
        pytest.param("t5", "plain", marks=pytest.mark.slow),
        ("t5", "forest"),
    ],
)
def test_prompts_without_rows_are_no_prompts(name, kind):
    model = (seq2seq if name == "t5" else causal)(name).requires_grad_(False)
    engine, empty = build_engine(Base(model), kind), torch.zeros(0, H)
    rows = [RowCase(row.source, row.target, 0) for row in ROWS]
    bare = [RowCase(row.source, row.target, -1) for row in ROWS]
    torch.testing.assert_close(
        engine.target_log_probs(engine_rows(rows, [empty])).values,
        engine.target_log_probs(engine_rows(bare, [])).values,
        **CLOSE,
    )
    with pytest.raises(DataError, match="nothing stands before its answer"):
        engine.target_log_probs(engine_rows([RowCase((), (7, 2), 0)], [empty]))


def test_layers_that_are_left_out_in_training():
    """The first layer takes the padding out; without it the packed pass would be wrong."""
    model = seq2seq("bart", encoder_layerdrop=0.5, decoder_layerdrop=0.5).requires_grad_(False)
    prompts, engine = prompts_for(model, 5, 3), build_engine(Base(model), "forest")
    plain = PlainEngine(Base(model), trusted=True)
    model.train()
    for seed in range(6):
        values = []
        for each in (engine, plain):
            torch.manual_seed(seed)
            values.append(each.target_log_probs(engine_rows(ROWS, prompts)).values)
        torch.testing.assert_close(*values, **CLOSE)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointing_without_a_trained_prompt():
    model = causal("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = model.config._attn_implementation
    prompts = [prompt.detach() for prompt in prompts_for(model, 5, 3)]
    ForestEngine(Base(model)).target_log_probs(engine_rows(ROWS, prompts)).values.sum().backward()
    assert model.config._attn_implementation == before


def test_hidden_states_asked_for_in_the_config_keep_their_shape():
    base = build(tf.AutoModelForSequenceClassification, ENCODERS["bert"](), num_labels=3)
    base.config.output_hidden_states = True
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    model = get_peft_model(base, config).eval()
    ids, mask = padded([[5, 6, 7, 8, 2], [11, 2]], "right")
    states = model(input_ids=ids, attention_mask=mask).hidden_states
    assert {tuple(each.shape) for each in states} == {(2, 10, H)}


def test_attention_scaled_by_the_column_is_declined():
    config = tf.Llama4TextConfig(
        **GQA,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=8,
        attn_temperature_tuning=True,
    )
    model = build(tf.AutoModelForCausalLM, config).requires_grad_(False)
    assert "scales attention by column" in choose_engine(Base(model)).reason


def test_an_exception_inside_the_model_leaves_nothing_behind():
    for model in (causal("llama"), seq2seq("t5"), seq2seq("bart")):
        engine, before = build_engine(Base(model), "forest"), model.config._attn_implementation
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-2]

        def fail(*_):
            raise KeyError

        handle = linear.register_forward_hook(fail)
        with contextlib.suppress(KeyError):
            engine.target_log_probs(engine_rows(ROWS, prompts_for(model, 5, 3)))
        handle.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.config._attn_implementation == before


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_two_checkpointed_passes_in_one_backward():
    model = causal("llama").requires_grad_(False)
    engine, prompts = ForestEngine(Base(model)), prompts_for(model, 5, 3)

    def gradients():
        loss = engine.target_log_probs(engine_rows(ROWS, prompts)).values.sum()
        loss = loss + engine.target_log_probs(engine_rows(ROWS[::-1], prompts)).values.sum()
        return torch.autograd.grad(loss, prompts)

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model():
    model = causal("llama").requires_grad_(False)
    engine, prompts = build_engine(Base(model), "forest"), prompts_for(model, 5, 3)
    expected = engine.target_log_probs(engine_rows(ROWS, prompts)).values
    theirs = torch.autograd.grad(expected.sum(), prompts)
    torch._dynamo.reset()
    model.compile(backend="eager")
    got = engine.target_log_probs(engine_rows(ROWS, prompts)).values
    torch.testing.assert_close(got, expected, **CLOSE)
    for a, b in zip(torch.autograd.grad(got.sum(), prompts), theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
