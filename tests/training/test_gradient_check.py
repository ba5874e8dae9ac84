"""Before training: whether the base passes on the gradient of a prompt; and a base that is quantised."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import softprompt
from oracles.families import CAUSAL, SEQ2SEQ, causal, seq2seq
from oracles.quantised import packed, quantised
from oracles.slow import only
from oracles.weights import weights_hash
from softprompt import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softprompt.backbone import Base
from softprompt.engine import (
    Drawn,
    EngineRow,
    PlainEngine,
    build_engine,
    gradient_problem,
    score_of,
    why_undecodable,
)
from softprompt.errors import TrainingError
from softprompt.prompts import Prompt


def problem(model, kind="plain", *, keys_and_values=False):
    base = Base(model)
    drawn = Drawn(base)
    values = drawn.keys_and_values(4) if keys_and_values else drawn.virtual_tokens(4)
    prompt = Prompt(prefix=values) if keys_and_values else Prompt(values)
    row = EngineRow(drawn.tokens(5), drawn.tokens(2))
    return gradient_problem(base, prompt, score_of(build_engine(base, kind), row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    only(["llama", "mixtral", "gemma3", "t5"], sorted({**CAUSAL, **SEQ2SEQ})),
)
def test_sound_bases_raise_no_alarm(name, dtype):
    model = causal(name) if name in CAUSAL else seq2seq(name)
    assert problem(model.to(dtype), "auto") == ""


def test_scores_that_bend_within_a_small_step_raise_no_alarm():
    """As those of BoolQ's shortest row behind a new prompt on SmolLM2: 0.0022 nats where the slope says 0.003."""
    base = Base(causal("llama"))
    values = Drawn(base).virtual_tokens(4)

    def score(prompt):
        return 0.003 * torch.sin(1000 * (prompt.input - values).sum())[None]

    assert gradient_problem(base, Prompt(values), score) == ""


def detached(forward):
    return lambda *args, **named: forward(*args, **named).detach()


def without_gradients(forward):
    return torch.no_grad()(forward)


@pytest.mark.parametrize("broken", [detached, without_gradients])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_that_stops_the_gradient_is_named(broken, dtype):
    model = causal("llama").to(dtype)
    layer = model.model.layers[1].mlp
    layer.forward = broken(layer.forward)
    assert problem(model) == "model.layers.1.mlp (LlamaMLP) stops it"


def test_a_backward_that_raises_is_a_cause():
    """As that of bitsandbytes' 8-bit layers, whose offloaded weights are gone by then."""

    class Gone(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise AttributeError("no scales\nand more")

    model = causal("llama")
    model.model.norm.register_forward_hook(lambda module, inputs, output: Gone.apply(output))
    assert problem(model) == "backward raises AttributeError: no scales"


def test_a_wrong_backward_is_seen_in_the_loss():
    class Steeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    model = causal("llama")
    model.model.norm.register_forward_hook(lambda module, inputs, output: Steeper.apply(output))
    assert problem(model).startswith("moved along it, a prompt changes the log-probability of a training row by")


def test_a_gradient_of_zero_is_a_problem():
    model = causal("llama")
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * 0)
    assert problem(model) == "its norm is 0 on a training row"


def test_probes_and_passes_leave_quantised_weights_as_they_are():
    model = quantised(causal("llama"))
    before = weights_hash(model)
    base = Base(model)
    assert problem(model, "auto") == "" and problem(model, "auto", keys_and_values=True) == ""
    why_undecodable(base)
    row = EngineRow((1, 2), (3,), None)
    with torch.no_grad(), base.running():
        PlainEngine(base).target_log_probs([row])
        model(input_ids=torch.tensor([[1, 2]]))
    ours = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with torch.no_grad():
        ours(input_ids=torch.tensor([[1, 2]]))
    assert packed(model) == 0 and weights_hash(model) == before
    assert not any(module.training for module in model.modules())


def test_weights_that_are_packed_already_are_a_problem():
    model = quantised(causal("llama"))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))
    assert packed(model)
    assert "(PackingLinear) stops it" in problem(model)


def tuned(llama, rows, model, method):
    base = Base(model, AutoTokenizer.from_pretrained(llama), str(llama))
    return softprompt.tune(
        base,
        rows,
        verbalizer="{{input}}",
        method=method,
        tuning_config={"num_virtual_tokens": 3},
        num_epochs=1,
        batch_size=4,
        silence_progress_bars=True,
    )


@pytest.mark.parametrize("method", only(["prefix"], ["prompt_tuning", "prefix"]))
def test_tune_runs_nothing_without_gradients_before_it_has_checked_the_gradient(llama, rows, method):
    model, passes = AutoModelForCausalLM.from_pretrained(llama), []
    model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    tuned(llama, rows, model, method)
    assert passes[0] and not all(passes)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix"])
def test_tune_names_what_stops_the_gradient_before_any_other_pass(llama, rows, method):
    model, passes = AutoModelForCausalLM.from_pretrained(llama), []
    layer = model.model.layers[1].mlp
    layer.forward = detached(layer.forward)
    model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    with pytest.raises(TrainingError, match=r"model\.layers\.1\.mlp \(LlamaMLP\) stops it"):
        tuned(llama, rows, model, method)
    assert passes == [True]


@pytest.mark.parametrize(("layer", "cause"), [(0, "keys and values of layer 0"), (-1, "LlamaDecoderLayer")])
def test_a_base_that_stops_the_gradient_still_answers_behind_a_prefix_and_names_what_stops_it(layer, cause):
    ids = torch.tensor([[4, 5, 6, 7]])
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    base = causal("llama")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    stopping = causal("llama")
    stopping.load_state_dict(base.state_dict())
    stopping.model.layers[layer].register_forward_hook(lambda module, given, output: output.detach())
    again = get_peft_model(stopping, config).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, expected)
    with pytest.raises(TrainingError, match=cause):
        again.train()(input_ids=ids, labels=ids)
