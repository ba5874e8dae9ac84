"""Every method against the installed peft, on one base: forward, gradients, generate, files both ways."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch

import softprompt
from oracles.caches import CACHE
from oracles.peft_pair import TASKS, base, batch
from oracles.slow import only

P = 5
CONTEXT = {
    "cpt_token_ids": [3, 4, 5, 6, 7],
    "cpt_mask": [1] * 5,
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.8,
}
METHODS = {
    "multitask": (
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": P, "num_tasks": 3, "num_ranks": 2},
    ),
    "mlp": ("PromptEncoderConfig", {"num_virtual_tokens": P, "encoder_hidden_size": 12}),
    "lstm": (
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": P,
            "encoder_hidden_size": 12,
            "encoder_reparameterization_type": "LSTM",
        },
    ),
    "cpt": ("CPTConfig", CONTEXT),
}
CAUSAL = list(METHODS)
SEQ2SEQ = ["multitask", "mlp", "lstm"]


def options_of(method, task, submodules=1):
    _, options = METHODS[method]
    return {"task_type": task, **options, "num_transformer_submodules": submodules}


def pair(method, task, submodules=1):
    """Return (ours, peft's) on copies of one base, with equal, random parameters."""
    name, _ = METHODS[method]
    options = options_of(method, task, submodules)
    if method == "cpt":
        del options["num_transformer_submodules"]
    model = base(task)
    torch.manual_seed(1)
    ours = softprompt.get_peft_model(copy.deepcopy(model), getattr(softprompt, name)(**options))
    theirs = attached_by_peft(model, getattr(peft, name)(**options))
    state = ours.prompt_encoder["default"].state_dict()
    generator = torch.Generator().manual_seed(2)
    for key, value in state.items():
        if key != "embedding.weight":
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    theirs.prompt_encoder["default"].load_state_dict(state)
    return ours.eval(), theirs.eval()


def attached_by_peft(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config)


def inputs_of(method, task, **options):
    inputs = batch(task, **options)
    if method == "multitask":
        inputs["task_ids"] = torch.tensor([2, 0, 2])
    if method == "cpt":
        inputs["input_type_mask"] = torch.tensor([[1, 2, 2, 3, 4, 4, 4, 4]] * 3)
    return inputs


def run(model, inputs):
    """Run a copy of the inputs: peft changes type masks in place."""
    return model(**{name: value.clone() for name, value in inputs.items()})


def gradients(model):
    return {
        name: parameter.grad
        for name, parameter in model.prompt_encoder["default"].named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("method", "task"),
    [(m, "CAUSAL_LM") for m in CAUSAL] + [(m, "SEQ_2_SEQ_LM") for m in SEQ2SEQ],
)
def test_loss_logits_and_gradients(method, task):
    ours, theirs = pair(method, task)
    inputs = inputs_of(method, task)
    mine, other = run(ours, inputs), run(theirs, inputs)
    assert abs(mine.loss.item() - other.loss.item()) < 1e-5
    real = torch.cat([torch.ones(3, P), inputs["attention_mask"]], dim=1).bool()
    if task == "CAUSAL_LM":
        assert torch.allclose(mine.logits[real], other.logits[real], atol=1e-5)
    else:
        assert torch.allclose(mine.logits, other.logits, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    for name, gradient in gradients(ours).items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


@pytest.mark.parametrize("method", ["multitask", "mlp"])
def test_classification(method):
    ours, theirs = pair(method, "SEQ_CLS")
    inputs = inputs_of(method, "SEQ_CLS")
    mine, other = run(ours, inputs), run(theirs, inputs)
    assert torch.allclose(mine.logits, other.logits, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


@pytest.mark.parametrize("task", TASKS)
def test_each_row_has_the_prompt_of_its_task(task):
    """For every task type, those PEFT cannot run among them: as one plain prompt for each task."""
    ours, _ = pair("multitask", task)
    inputs = inputs_of("multitask", task)
    del inputs["task_ids"]
    with torch.no_grad():
        mixed = ours(**inputs, task_ids=torch.tensor([2, 0, 2]))
        values = {k: ours.encoder_of("default").materialize(k).clone() for k in (0, 2)}
        several = ours.task_type
        plain = softprompt.get_peft_model(
            ours.detach(), softprompt.PromptTuningConfig(task_type=several, num_virtual_tokens=P)
        ).eval()
        for row, task_id in enumerate([2, 0, 2]):
            plain.prompt_encoder["default"].embedding.weight.copy_(values[task_id])
            alone = plain(**{name: value[row : row + 1] for name, value in inputs.items()})
            for name, value in alone.items():
                if name != "loss" and torch.is_tensor(value):
                    real = inputs["attention_mask"][row].bool()
                    if value.dim() > 1 and value.shape[1] == P + len(real):
                        real = torch.cat([torch.ones(P).bool(), real])
                        assert torch.allclose(mixed[name][row, real], value[0, real], atol=1e-5)
                    else:
                        assert torch.allclose(mixed[name][row], value[0], atol=1e-5)


def test_a_task_that_is_none_is_refused():
    ours, _ = pair("multitask", "CAUSAL_LM")
    inputs = inputs_of("multitask", "CAUSAL_LM")
    for wrong in (3, -1):
        with pytest.raises(softprompt.SoftPromptError, match=rf"'default' go from 0 to 2, got {wrong}; use one of"):
            ours(**inputs | {"task_ids": torch.tensor([0, wrong, 2])})


def test_a_multitask_prompt_feeds_both_parts_by_default():
    name, options = METHODS["multitask"]
    options = {"task_type": "SEQ_2_SEQ_LM", **options}
    model = base("SEQ_2_SEQ_LM")
    ours = softprompt.get_peft_model(copy.deepcopy(model), getattr(softprompt, name)(**options))
    theirs = attached_by_peft(model, getattr(peft, name)(**options))
    mine, other = ours.active_peft_config, theirs.active_peft_config
    assert mine.num_transformer_submodules == other.num_transformer_submodules == 2
    encoder = {**options, "output_model_types": ["ENCODER"]}
    only = softprompt.get_peft_model(copy.deepcopy(model), getattr(softprompt, name)(**encoder)).active_peft_config
    assert only.num_transformer_submodules == 1


def test_both_parts_of_a_seq2seq_model():
    ours, theirs = pair("multitask", "SEQ_2_SEQ_LM", submodules=2)
    inputs = inputs_of("multitask", "SEQ_2_SEQ_LM")
    mine, other = run(ours, inputs), run(theirs, inputs)
    assert abs(mine.loss.item() - other.loss.item()) < 1e-5
    mine.loss.backward()
    other.loss.backward()
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name
    assert bool((ours.prompt_encoder["default"].embedding.weight.grad[P:] != 0).any())


@pytest.mark.parametrize(
    ("method", "task"),
    [(m, "CAUSAL_LM") for m in CAUSAL] + [(m, "SEQ_2_SEQ_LM") for m in SEQ2SEQ],
)
def test_greedy_text(method, task):
    ours, theirs = pair(method, task)
    inputs = inputs_of(method, task, padded=False)
    del inputs["labels"]
    inputs.pop("input_type_mask", None)
    kept = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mine = ours.generate(**inputs, **kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = theirs.generate(**inputs, **kept)
    assert torch.equal(mine, other)


def test_greedy_text_of_a_context():
    """Tokens that have not moved are the same text as real ones."""
    ours, _ = pair("cpt", "CAUSAL_LM")
    ours.prompt_encoder["default"].delta_embedding.weight.data.zero_()
    ids = batch("CAUSAL_LM", padded=False)["input_ids"]
    kept = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mine = ours.generate(input_ids=ids, **kept)
    context = torch.tensor(CONTEXT["cpt_token_ids"]).expand(3, -1)
    plain = ours.get_base_model().generate(input_ids=torch.cat([context, ids], dim=1), **kept)
    assert torch.equal(mine[:, -5:], plain[:, -5:])


@pytest.mark.parametrize("method", CAUSAL)
def test_files_go_both_ways(method, tmp_path):
    task = "CAUSAL_LM"
    ours, theirs = pair(method, task)
    inputs = inputs_of(method, task, padded=False)
    inputs.pop("labels")
    inputs.pop("input_type_mask", None)
    with torch.no_grad():
        expected = ours(**inputs).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    model = ours.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    back = softprompt.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
    labels = {"labels": None} if method == "cpt" else {}
    with torch.no_grad():
        assert torch.allclose(read(**inputs, **labels).logits, expected, atol=1e-5)
        assert torch.allclose(back(**inputs).logits, expected, atol=1e-5)
    assert not any(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("method", only(["multitask", "lstm"], CAUSAL))
def test_a_saved_prompt_trains_further(method, tmp_path):
    ours, _ = pair(method, "CAUSAL_LM")
    ours.save_pretrained(tmp_path)
    again = softprompt.PeftModel.from_pretrained(ours.detach(), tmp_path, is_trainable=True)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained
    before = again.encoder_of("default").stored()["prompt_embeddings"]
    optimiser = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.5)
    again(**inputs_of(method, "CAUSAL_LM")).loss.backward()
    optimiser.step()
    assert not torch.equal(again.encoder_of("default").stored()["prompt_embeddings"], before)


def test_the_trajectory_of_a_context_is_pefts():
    ours, theirs = pair("cpt", "CAUSAL_LM")
    inputs = inputs_of("cpt", "CAUSAL_LM")
    for model in (ours, theirs):
        moves = model.prompt_encoder["default"].delta_embedding.parameters()
        optimiser = torch.optim.AdamW(moves, lr=0.01)
        for _ in range(6):
            optimiser.zero_grad()
            run(model, inputs).loss.backward()
            optimiser.step()
    with torch.no_grad():
        assert abs(run(ours, inputs).loss.item() - run(theirs, inputs).loss.item()) < 1e-5


def test_a_context_under_left_padding_is_the_row_alone():
    ours, _ = pair("cpt", "CAUSAL_LM")
    padded = inputs_of("cpt", "CAUSAL_LM", side="left")
    padded["input_type_mask"] = padded["input_type_mask"] * padded["attention_mask"]
    row = {name: value[1:2] for name, value in padded.items()}
    alone = {name: value[:, 3:] for name, value in row.items()}
    with torch.no_grad():
        assert abs(ours(**row).loss.item() - ours(**alone).loss.item()) < 1e-5


def test_the_loss_of_a_context_stands_first_in_a_tuple_and_needs_the_whole_row():
    ours, _ = pair("cpt", "CAUSAL_LM")
    inputs = inputs_of("cpt", "CAUSAL_LM")
    whole = run(ours, inputs)
    parts = ours(**{name: value.clone() for name, value in inputs.items()}, return_dict=False)
    assert torch.equal(parts[0], whole.loss)
    assert torch.equal(parts[1], whole.logits)
    ids = inputs["input_ids"]
    cache = ours(input_ids=ids[:, :4], use_cache=True)[CACHE]
    with pytest.raises(softprompt.SoftPromptError, match="labels of a context-aware prompt need the whole row"):
        ours(input_ids=ids[:, 4:], labels=ids[:, 4:], **{CACHE: cache})


def test_labels_with_several_prompts_of_which_one_is_a_context():
    ours, _ = pair("cpt", "CAUSAL_LM")
    inputs = inputs_of("cpt", "CAUSAL_LM")
    with pytest.raises(softprompt.SoftPromptError, match="need one prompt for the batch"):
        ours(**inputs, adapter_names=["default", "__base__", "default"])
    with ours.disable_adapter():
        assert bool(ours(**inputs).loss.isfinite())


@pytest.mark.parametrize("kind", ["low_rank", "ulpt", "residual"])
def test_parameterised_prompts_bake_into_pefts_files(kind, tmp_path):
    rank = {} if kind == "residual" else {"parameterization_rank": 3}
    model = base("CAUSAL_LM")
    config = softprompt.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, parameterization=kind, **rank
    )
    ours = softprompt.get_peft_model(copy.deepcopy(model), config).eval()
    inputs = batch("CAUSAL_LM", padded=False)
    optimiser = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=0.01)
    ours(**inputs).loss.backward()
    optimiser.step()
    with torch.no_grad():
        expected = ours(**inputs).logits
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(read(**inputs).logits, expected, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in ours.encoder_of("default").parameters()
    )
