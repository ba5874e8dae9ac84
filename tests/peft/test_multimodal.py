"""Models that see an image, or where words stand on a page, answer behind a prompt as peft makes them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as tf

import softprompt
from oracles import multimodal
from oracles.slow import only
from softprompt.errors import ConfigError

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
P = 5
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SEEING, KINDS = sorted(multimodal.MODELS), ["PromptTuningConfig", "PrefixTuningConfig"]


def pair(model, kind, task="CAUSAL_LM"):
    """Return (ours, peft's) on copies of one model, with equal prompts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(model), getattr(peft, kind)(task_type=task, num_virtual_tokens=P)
        ).eval()
    config = getattr(softprompt, kind)(task_type=task, num_virtual_tokens=P)
    ours = softprompt.get_peft_model(copy.deepcopy(model), config).eval()
    values = theirs.prompt_encoder["default"].embedding.weight.data.clone()
    ours.prompt_encoder["default"].load_stored({"prompt_embeddings": values})
    return ours, theirs


def generated(model, given, **options):
    given = {name: value.clone() for name, value in given.items()}
    return model.generate(**given, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_pass_is_pefts(name, kind):
    """peft drops token types, so without them; padding is on the right, which peft has right."""
    ours, theirs = pair(multimodal.model(name), kind)
    given = multimodal.batch(name, right=2)
    given.pop("token_type_ids", None)
    real = given["attention_mask"].bool()
    got, expected = (model(**given).logits[:, -12:][real] for model in (ours, theirs))
    torch.testing.assert_close(got, expected, **CLOSE)


def embedded(model, given):
    """Return the embeddings of a call, its image among them, and the arguments of the language model."""
    seen = {}
    language = model.model.language_model
    hook = language.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**given)
    hook.remove()
    return seen["inputs_embeds"], seen.get("position_ids")


@pytest.mark.parametrize("side", [{}, {"right": 2}, {"left": 2}])
@pytest.mark.parametrize("name", only(["gemma3", "qwen2_vl"], SEEING))
def test_a_pass_is_the_models_own_on_embeddings(name, side):
    """Every row alone, its prompt in front; token types and the positions of an image follow their tokens."""
    model, given = multimodal.model(name), multimodal.batch(name, **side)
    ours, _ = pair(model, "PromptTuningConfig")
    prompt = ours.prompt_encoder["default"].embedding.weight.detach()
    got = ours(**given).logits[:, -12:]
    for row in range(2):
        alone = multimodal.row(given, row)
        embeds, positions = embedded(model, alone)
        whole = {"inputs_embeds": torch.cat([prompt[None], embeds], 1)}
        if name == "qwen2_vl":
            own = torch.arange(P).expand(3, 1, P)
            whole["position_ids"] = torch.cat([own, positions[-3:] + P], 2)
        if name == "gemma3":
            whole["token_type_ids"] = torch.nn.functional.pad(alone["token_type_ids"], (P, 0))
        expected = model(**whole).logits[0, P:]
        torch.testing.assert_close(got[row][given["attention_mask"][row].bool()], expected, **CLOSE)


@pytest.mark.parametrize("kind", only(KINDS[:1], KINDS))
@pytest.mark.parametrize("name", only(["gemma3", "qwen2_vl"], SEEING))
def test_generated_as_peft_does(name, kind):
    ours, theirs = pair(multimodal.model(name), kind)
    given = multimodal.batch(name)
    for options in ({}, {"num_beams": 2}, {"guidance_scale": 1.5}):
        if name == "qwen2_vl" and "guidance_scale" in options:
            continue  # it has no text alone without its image, with no prompt either
        assert torch.equal(generated(ours, given, **options), generated(theirs, given, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", only(["gemma3"], SEEING))
def test_a_row_in_a_batch_is_the_row_alone(name, kind):
    ours, _ = pair(multimodal.model(name), kind)
    given = multimodal.batch(name, left=3)
    logits, written = ours(**given).logits[:, -12:], generated(ours, given)[:, 12:]
    for row in range(2):
        alone, real = multimodal.row(given, row), given["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row][real], ours(**alone).logits[0, -int(real.sum()) :], **CLOSE)
        assert torch.equal(generated(ours, alone)[0, int(real.sum()) :], written[row])


@pytest.mark.parametrize("name", only(["gemma3"], SEEING))
def test_gradients_reach_the_prompt(name):
    for kind in KINDS:
        ours, _ = pair(multimodal.model(name), kind)
        given = multimodal.batch(name, right=2)
        ours.train()(**given, labels=given["input_ids"]).loss.backward()
        (gradient,) = [p.grad for p in ours.parameters() if p.grad is not None]
        assert bool(gradient.abs().sum(-1).all())


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_words_on_a_page(task):
    """The boxes of virtual tokens are those of padding."""
    kinds = {
        "SEQ_CLS": tf.LayoutLMForSequenceClassification,
        "TOKEN_CLS": tf.LayoutLMForTokenClassification,
    }
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = kinds[task](tf.LayoutLMConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()
    config = softprompt.PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    ours = softprompt.get_peft_model(copy.deepcopy(model), config).eval()
    ids, mask = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    boxes = torch.randint(0, 1000, (2, 9, 2)).sort(2).values.repeat(1, 1, 2)[..., [0, 2, 1, 3]]
    got = ours(input_ids=ids, attention_mask=mask, bbox=boxes).logits
    prompt = next(iter(ours.prompt_encoder["default"].parameters())).detach()
    for row, count in enumerate((9, 6)):
        embeds = torch.cat([prompt, model.get_input_embeddings()(ids[row, :count])])[None]
        around = torch.cat([boxes.new_zeros(P, 4), boxes[row, :count]])[None]
        expected = model(inputs_embeds=embeds, bbox=around).logits[0]
        mine = got[row] if task == "SEQ_CLS" else torch.cat([got[row, :P], got[row, P : P + count]])
        torch.testing.assert_close(mine, expected, **CLOSE)


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8)])
def test_other_ranks_are_one_clear_line(shape):
    ours, _ = pair(multimodal.model("llava"), "PromptTuningConfig")
    told = r"input_ids must be \[B, T\], got .*; " + ("pass input_ids" if len(shape) == 1 else "run each choice")
    for call in (ours, ours.generate):
        with pytest.raises(ConfigError, match=told):
            call(input_ids=torch.ones(shape, dtype=torch.long))
