"""In training, the loss comes from the engine: the padded pass's loss and gradients, its logits on demand."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from accelerate.utils import convert_outputs_to_fp32

import softprompt
from oracles import peft_pair
from oracles.caches import CACHE
from oracles.families import SEQ2SEQ, build, causal
from oracles.slow import only
from softprompt.errors import ConfigError, TrainingError
from softprompt.peft.training_loss import LossOutput

P = 4
METHODS = {
    "prompt_tuning": dict(cls="PromptTuningConfig", num_virtual_tokens=P),
    "suffix": dict(cls="PromptTuningConfig", num_virtual_tokens=P, placement="suffix"),
    "after_bos": dict(cls="PromptTuningConfig", num_virtual_tokens=P, placement="after_bos"),
    "residual": dict(cls="PromptTuningConfig", num_virtual_tokens=P, parameterization="residual"),
    "p_tuning": dict(cls="PromptEncoderConfig", num_virtual_tokens=P),
    "prefix": dict(cls="PrefixTuningConfig", num_virtual_tokens=P),
    "projected": dict(cls="PrefixTuningConfig", num_virtual_tokens=P, prefix_projection=True),
    "cartridge": dict(cls="CartridgeConfig", num_virtual_tokens=P),
    "multitask": dict(cls="MultitaskPromptTuningConfig", num_virtual_tokens=P, num_tasks=2),
}
FAMILIES = ("llama", "gpt2", "gemma2", "gptj")


def prompted(family="llama", method="prompt_tuning", **changes):
    options = dict(METHODS[method])
    config = getattr(softprompt, options.pop("cls"))(task_type="CAUSAL_LM", **options)
    base = causal(family, **changes)
    base.config.bos_token_id = 1
    torch.manual_seed(0)
    return softprompt.get_peft_model(base, config)


def quiet(model):
    """Let a model train without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout_p", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def batch(side="right", labels="answers"):
    """Three rows of unlike lengths: labels of everything, of the answers, or of two answers with a gap."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 60, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 4)):
        mask[row, slice(length, None) if side == "right" else slice(0, 9 - length)] = 0
    ids = ids.where(mask.bool(), torch.zeros_like(ids))
    order = mask.cumsum(1)  # 1 for a row's first token
    kept = {
        "everything": order >= 1,
        "answers": order >= 3,
        "gap": (order == 2) | (order == 4),
        "one row": (order >= 3) & (torch.arange(3) == 1)[:, None],
    }[labels] & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(kept, torch.full_like(ids, -100))}


def gradients(model, outputs):
    model.zero_grad()
    outputs.loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def both(model, inputs, **more):
    """Return loss and gradients by the engine, and by the padded pass (``use_cache=True`` asks for that)."""
    fast = model(**inputs, **more)
    plain = model(**inputs, **more, use_cache=True)
    assert isinstance(fast, LossOutput) and not isinstance(plain, LossOutput)
    return (fast, gradients(model, fast)), (plain, gradients(model, plain))


def check_equal(model, inputs, **more):
    (fast, ours), (plain, expected) = both(model, inputs, **more)
    torch.testing.assert_close(fast.loss, plain.loss, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-4)
    return fast, plain


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels", only(["answers", "gap"], ["everything", "answers", "gap", "one row"]))
def test_the_loss_is_the_padded_pass_s(side, labels):
    model = quiet(prompted())
    fast, plain = check_equal(model, batch(side, labels))
    torch.testing.assert_close(fast.logits, plain.logits)


@pytest.mark.parametrize("family", only(["gptj"], FAMILIES))
@pytest.mark.parametrize("method", only(["prompt_tuning"], ["prompt_tuning", "prefix"]))
def test_families(family, method):
    check_equal(quiet(prompted(family, method)), batch())


@pytest.mark.parametrize("method", only(["prompt_tuning", "suffix", "prefix", "multitask"], METHODS))
@pytest.mark.parametrize("side", only(["left"], ["right", "left"]))
def test_methods(method, side):
    more = {"task_ids": torch.tensor([0, 1, 0])} if method == "multitask" else {}
    check_equal(quiet(prompted(method=method)), batch(side), **more)


@pytest.mark.parametrize("items", [pytest.param(7, marks=pytest.mark.slow), torch.tensor(7)])
def test_num_items_in_batch(items):
    model = quiet(prompted())
    fast, _ = check_equal(model, batch(), num_items_in_batch=items)
    whole = model(**batch()).loss
    assert not torch.isclose(fast.loss, whole)


def test_a_prompt_for_each_row():
    model = prompted()
    model.add_adapter("other", softprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for labels in ("answers", "everything"):
        check_equal(quiet(model), batch(labels=labels), adapter_names=["default", "other", "__base__"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", only([False], [True, False]))
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_gradient_checkpointing(use_reentrant, method):
    model = quiet(prompted(method=method))
    _, expected = model(**batch()), gradients(model, model(**batch()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for more in ({}, {"output_hidden_states": True}):  # by the engine, and padded
        found = gradients(model, model(**batch(), **more))
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-4)


def heads(model):
    return softprompt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, modules_to_save=["lm_head"])


@pytest.mark.parametrize(
    "changes",
    [
        {"output_hidden_states": True},
        {"return_dict": False},
        {"use_cache": True},
        {"position_ids": torch.arange(9).expand(3, -1)},
        {"labels": torch.full((3, 9), 5)},  # other tokens than the input's
        {"labels": torch.full((3, 9), -100)},
        {"labels": None},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_is_left_to_the_padded_pass(changes):
    model = quiet(prompted())
    assert not isinstance(model(**{**batch(), **changes}), LossOutput)


def test_not_outside_training():
    model = quiet(prompted())
    with torch.no_grad():
        assert not isinstance(model(**batch()), LossOutput)
    with model.disable_adapter():
        assert not isinstance(model(**batch()), LossOutput)
    assert isinstance(model(**batch()), LossOutput)
    assert not isinstance(model.eval()(**batch()), LossOutput)
    headed = prompted()
    headed.add_adapter("headed", heads(headed))
    headed.set_adapter("headed")
    assert not isinstance(quiet(headed)(**batch()), LossOutput)


def test_a_base_that_somebody_trains_too_gets_the_same_gradients():
    model = quiet(prompted())
    trained = [model.base_model.lm_head.weight, model.base_model.model.layers[0].self_attn.k_proj.weight]
    for weight in trained:
        weight.requires_grad_(True)
    found = []
    for more in ({}, {"use_cache": True}):
        outputs = model(**batch(), **more)
        assert isinstance(outputs, LossOutput) is not bool(more)
        found.append(torch.autograd.grad(outputs.loss, trained))
    for fast, padded in zip(*found, strict=True):
        torch.testing.assert_close(fast, padded, atol=1e-6, rtol=1e-4)


class Steeper(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


SPOILT = {"stopped": lambda x: x.detach(), "steeper": Steeper.apply, "lost": lambda x: x * 0}


def spoil(base, how):
    """Let the first layer of a base stop, double or lose the gradient."""
    ends = (".layers.0", ".layer.0", ".block.0")
    layer = next(module for name, module in base.named_modules() if name.endswith(ends))

    def hook(module, inputs, output):
        return (SPOILT[how](output[0]), *output[1:]) if isinstance(output, tuple) else SPOILT[how](output)

    layer.register_forward_hook(hook)


@pytest.mark.parametrize("task", only(["CAUSAL_LM", "SEQ_2_SEQ_LM"], peft_pair.TASKS))
@pytest.mark.parametrize("how", SPOILT)
def test_a_base_that_loses_the_gradient_is_refused_at_the_first_training_call(task, how):
    config = softprompt.PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    model = softprompt.get_peft_model(peft_pair.base(task), config).train()
    spoil(model.base_model, how)
    inputs = peft_pair.batch(task)
    with torch.no_grad():
        model(**inputs)
    for _ in range(2):
        with pytest.raises(TrainingError, match="does not pass on the gradient of a prompt: "):
            model(**inputs)


@pytest.mark.parametrize("task", only(["CAUSAL_LM", "SEQ_CLS"], peft_pair.TASKS))
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_the_gradient_is_checked_once_and_found_sound(task, method):
    config = getattr(softprompt, method)(task_type=task, num_virtual_tokens=P)
    model, calls = softprompt.get_peft_model(peft_pair.base(task), config).train(), []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        before = len(calls)
        model(**peft_pair.batch(task))
    assert len(calls) - before <= 1 < before
    again = softprompt.get_peft_model(model.detach(), config).train()
    before = len(calls)
    again(**peft_pair.batch(task))
    assert len(calls) - before <= 1


def test_a_head_that_starts_at_zero_is_no_alarm():
    base = peft_pair.base("SEQ_CLS")
    for weight in base.classifier.parameters():
        torch.nn.init.zeros_(weight)
    config = softprompt.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    softprompt.get_peft_model(base, config).train()(**peft_pair.batch("SEQ_CLS")).loss.backward()


def test_a_model_whose_loss_is_another_is_left_to_its_own(monkeypatch):
    model = quiet(prompted())
    monkeypatch.setattr(
        type(model.base_model), "loss_function", property(lambda self: lambda logits, **_: logits.square().mean())
    )
    outputs = model(**batch())
    assert not isinstance(outputs, LossOutput)
    torch.testing.assert_close(outputs.loss, outputs.logits.square().mean())


def test_logits_are_made_when_they_are_read():
    model = quiet(prompted())
    expected = model(**batch(), use_cache=True).logits
    passes = []
    handle = model.base_model.register_forward_hook(lambda *_: passes.append(1))
    for read in (
        lambda out: out.logits,
        lambda out: out["logits"],
        lambda out: out.get("logits"),
        lambda out: out[1],
        lambda out: out[:2][1],
        lambda out: out.to_tuple()[1],
    ):
        model.train()
        outputs = model(**batch())
        passes.clear()
        assert list(outputs) == ["loss"] and outputs["loss"] is outputs[0] and not passes
        torch.testing.assert_close(read(outputs), expected)
        assert len(passes) == 1 and outputs.logits is not None and len(passes) == 1
        assert list(outputs)[:2] == ["loss", "logits"] and outputs[CACHE] is not None
    handle.remove()


def test_logits_after_an_update_are_refused_not_wrong():
    model = quiet(prompted())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    outputs = model(**batch())
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"read outputs\.logits before"):
        _ = outputs.logits
    inputs = batch()
    outputs = model(**inputs)
    inputs["input_ids"].add_(1)
    with pytest.raises(ConfigError, match="batch has changed"):
        _ = outputs.logits


def test_logits_carry_gradients():
    model = quiet(prompted())
    outputs = model(**batch())
    (outputs.loss + outputs.logits.square().mean()).backward()
    got = model.prompt_encoder["default"].embedding.weight.grad.clone()
    model.zero_grad()
    plain = model(**batch(), use_cache=True)
    (plain.loss + plain.logits.square().mean()).backward()
    torch.testing.assert_close(got, model.prompt_encoder["default"].embedding.weight.grad, atol=2e-5, rtol=2e-4)


def test_copies_train_alike():
    model = quiet(prompted())
    model(**batch())
    torch.testing.assert_close(copy.deepcopy(model)(**batch()).loss, model(**batch()).loss)


@pytest.mark.parametrize("family", only(["llama", "t5"], ["llama", "gpt2", "t5"]))
def test_autocast_rounds_as_the_padded_pass_does(family):
    """Both are as far from float32; the outputs that accelerate copies make the same logits."""
    model = quiet(writer(family) if family == "t5" else prompted(family))
    inputs = answered() if family == "t5" else batch()
    (_, exact), (expected, _) = both(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        (fast, ours), (plain, theirs) = both(model, inputs)
        copied = convert_outputs_to_fp32(model.forward)(**inputs)
        wanted = model(**inputs, use_cache=True).logits
    assert fast.loss.dtype == torch.float32 and plain.logits.dtype == torch.bfloat16
    for got, noisy, right in zip(ours, theirs, exact, strict=True):
        assert float((got - right).norm()) < 2 * float((noisy - right).norm()) < 0.1 * float(right.norm())
        assert not torch.equal(got, right)
    assert abs(fast.loss.item() - expected.loss.item()) < 0.01
    assert isinstance(copied, LossOutput) and copied.loss.dtype == copied.logits.dtype == torch.float32
    assert torch.equal(copied.logits, wanted.float())


SEQ2SEQ_METHODS = {
    "prompt_tuning": METHODS["prompt_tuning"],
    "both sides": dict(METHODS["prompt_tuning"], output_model_types=["ENCODER", "DECODER"]),
    "blind": dict(METHODS["prompt_tuning"], prompt_sees_input=False),
    "decoder": dict(METHODS["prompt_tuning"], output_model_types=["DECODER"]),
    "p_tuning": METHODS["p_tuning"],
    "multitask": METHODS["multitask"],
}


def writer(family="t5", method="prompt_tuning", **changes):
    options = dict(SEQ2SEQ_METHODS[method])
    config = getattr(softprompt, options.pop("cls"))(task_type="SEQ_2_SEQ_LM", **options, **changes)
    torch.manual_seed(0)
    return softprompt.get_peft_model(build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ[family]()), config)


def answered():
    """Three rows of unlike lengths, with answers of 3, 1 and 5 tokens."""
    inputs = batch()
    labels = torch.full((3, 5), -100)
    for row, length in enumerate((3, 1, 5)):
        labels[row, :length] = torch.arange(7, 7 + length)
    return inputs | {"labels": labels}


@pytest.mark.parametrize("family", only(["t5", "bart"], SEQ2SEQ))
def test_seq2seq_families(family):
    fast, plain = check_equal(quiet(writer(family)), answered())
    torch.testing.assert_close(fast.logits, plain.logits)
    torch.testing.assert_close(fast.encoder_last_hidden_state, plain.encoder_last_hidden_state)


@pytest.mark.parametrize("method", only(["both sides", "blind"], SEQ2SEQ_METHODS))
def test_seq2seq_methods(method):
    more = {"task_ids": torch.tensor([0, 1, 0])} if method == "multitask" else {}
    check_equal(quiet(writer(method=method)), answered(), **more)


def test_what_seq2seq_takes_and_leaves():
    """A collator's own decoder ids are those of the labels; items count where the model counts them."""
    model, inputs = quiet(writer()), answered()
    shifted = model.base_model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    check_equal(model, inputs, decoder_input_ids=shifted)
    check_equal(model, inputs, num_items_in_batch=torch.tensor(4))
    gap = inputs["labels"].clone()
    gap[2, 1] = -100
    for change in (
        {"decoder_input_ids": shifted + 1},
        {"labels": gap},
        {"attention_mask": torch.zeros(3, 9, dtype=torch.long)},
        {"decoder_attention_mask": torch.ones(3, 5, dtype=torch.long)},
    ):
        assert not isinstance(model(**{**inputs, **change}), LossOutput)
    prefix = softprompt.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    behind = softprompt.get_peft_model(build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ["t5"]()), prefix)
    assert not isinstance(quiet(behind)(**inputs), LossOutput)
