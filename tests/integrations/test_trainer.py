"""A script written for PEFT and transformers' Trainer runs with the import changed; here ``peft`` is installed."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers as tf
from accelerate.utils import is_peft_model
from safetensors.torch import load_file

import softprompt
from oracles.checkpointing import recomputes
from oracles.families import ENCODERS, SEQ2SEQ, build, causal
from oracles.slow import only
from oracles.trainer import SHORT
from softprompt.errors import ArtifactError
from softprompt.peft import model as model_module

P = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

CONFIGS = {
    "prompt_tuning": lambda lib, task: lib.PromptTuningConfig(task_type=task, num_virtual_tokens=P),
    "prefix": lambda lib, task: lib.PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
    "p_tuning": lambda lib, task: lib.PromptEncoderConfig(task_type=task, num_virtual_tokens=P),
    "projected": lambda lib, task: lib.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=True
    ),
    "residual": lambda lib, task: lib.PromptTuningConfig(
        task_type=task, num_virtual_tokens=P, parameterization="residual"
    ),
    "cartridge": lambda lib, task: lib.CartridgeConfig(task_type=task, num_virtual_tokens=P),
    "head": lambda lib, task: lib.PromptTuningConfig(
        task_type=task, num_virtual_tokens=P, modules_to_save=["lm_head"]
    ),
    "cpt": lambda lib, task: lib.CPTConfig(
        task_type=task, cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
}


def tied(**changes):
    """A GPT-2, whose head is its embedding: a whole state dict of it cannot be written as safetensors."""
    return causal("gpt2", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, **changes)


def records(count=16, *, spare=True):
    """Rows of 8 ids with a column that no model takes."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 60, (8,), generator=generator).tolist()
        row = {"input_ids": ids, "attention_mask": [1] * 8, "labels": ids}
        rows.append(row | ({"note": f"number {number}"} if spare else {}))
    return datasets.Dataset.from_list(rows)


def trainer(model, folder, *, data=None, callbacks=(), collator=None, metrics=None, **options):
    data = records() if data is None else data
    return tf.Trainer(
        model,
        tf.TrainingArguments(str(folder), **{**SHORT, "save_strategy": "no", **options}),
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
        data_collator=collator,
        compute_metrics=metrics,
    )


def prompted(library=softprompt, method="prompt_tuning", base=None, task="CAUSAL_LM"):
    base = tied() if base is None else base
    torch.manual_seed(0)
    return library.get_peft_model(base, CONFIGS[method](library, task))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Stop(tf.TrainerCallback):
    """Stops behind an epoch, as a machine that is taken away."""

    def on_epoch_end(self, args, state, control, **_):
        control.should_training_stop = True


@pytest.mark.parametrize("method", only(["prompt_tuning"], ["prompt_tuning", "prefix"]))
def test_trains_as_peft_does(tmp_path, method):
    """The same script twice, the import changed: same first prompt, same losses, same prompt afterwards."""
    found = {}
    for library in (peft, softprompt):
        torch.manual_seed(3)
        model = prompted(library, method, causal("llama"))
        run = trainer(model, tmp_path, logging_steps=1)
        assert run.label_names == ["labels"]
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        found[library] = (losses, run.evaluate()["eval_loss"], *trained(model).values())
    ours, theirs = found[softprompt], found[peft]
    assert len(ours[0]) == 8 and ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours[1] == pytest.approx(theirs[1], abs=1e-4)
    # Adam divides by a gradient's size, so that of a value without any may go either way.
    torch.testing.assert_close(ours[2], theirs[2], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", only(["seq2seq"], ["causal bf16", "seq2seq", "seq2seq bf16"]))
def test_the_fast_path_trains_as_peft_does(tmp_path, monkeypatch, kind):
    """Every step's loss is the engine's; under autocast both round, each in its own order."""
    steps, make = [], model_module.training_output
    monkeypatch.setattr(model_module, "training_output", lambda *a, **k: steps.append(make(*a, **k)) or steps[-1])
    found = {}
    for library in (peft, softprompt):
        seq2seq = kind.startswith("seq2seq")
        base = build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ["t5"](), dropout_rate=0.0) if seq2seq else causal("llama")
        torch.manual_seed(0)
        config = library.PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
            num_virtual_tokens=P,
            num_transformer_submodules=1,
        )
        model = library.get_peft_model(base, config)
        run = trainer(model, tmp_path, logging_steps=1, bf16="bf16" in kind)
        run.train()
        found[library] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(steps) == len(found[peft]) == 8 and None not in steps
    assert found[softprompt] == pytest.approx(found[peft], abs=5e-3 if "bf16" in kind else 1e-4)


@pytest.mark.parametrize("method", only(["prompt_tuning"], CONFIGS))
def test_resuming_equals_never_having_stopped(tmp_path, method):
    whole = prompted(method=method)
    trainer(whole, tmp_path / "whole").train()
    trainer(prompted(method=method), tmp_path / "cut", save_strategy="epoch", callbacks=[Stop()]).train()
    resumed = prompted(method=method)
    before = trained(resumed)
    trainer(resumed, tmp_path / "cut", save_strategy="epoch").train(resume_from_checkpoint=True)
    assert trained(resumed).keys() == before.keys()
    for name, value in trained(whole).items():
        assert torch.equal(trained(resumed)[name], value)
        assert not torch.equal(before[name], value)


def test_a_checkpoint_holds_the_adapter_alone(tmp_path):
    model = prompted()
    run = trainer(model, tmp_path, save_strategy="epoch", push_to_hub=False, hub_model_id="someone/prompt")
    run.train()
    folder = tmp_path / "checkpoint-8"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert not {"model.safetensors", "config.json", "training_parameters.safetensors"} & names
    assert load_file(folder / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
    theirs = peft.PeftModel.from_pretrained(tied(), str(folder))
    saved = theirs.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(saved, model.prompt_encoder["default"].embedding.weight)


def test_every_save_is_pushed_as_an_adapter(tmp_path, monkeypatch):
    """``push_to_hub=True`` and its arguments; what stands in for the Hub keeps what it is sent."""
    pushed = []

    class Hub:
        def create_repo(self, name, **options):
            pushed.append((name, options["private"], options["token"]))
            return self

        def upload_folder(self, *, repo_id, folder_path, commit_message, token, **_):
            names = {path.name for path in Path(folder_path).iterdir()}
            pushed.append((repo_id, commit_message, token, "adapter_model.safetensors" in names, names))
            return self

        repo_id = "someone/prompt"
        done = result = cancel = lambda self: True

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    options = {"hub_model_id": "someone/prompt", "hub_private_repo": True, "hub_token": "secret"}
    trainer(
        prompted(), tmp_path, save_strategy="epoch", push_to_hub=True, hub_strategy="every_save", **options
    ).train()
    assert pushed[0] == ("someone/prompt", True, "secret")
    messages = [f"Training in progress, epoch {epoch}" for epoch in (1, 2)]
    assert [each[:4] for each in pushed[1:]] == [("someone/prompt", m, "secret", True) for m in messages]
    assert not any({"model.safetensors", "config.json"} & each[4] for each in pushed[1:])


def test_a_reparameterised_prompt_is_saved_baked_and_resumed_whole(tmp_path):
    model = prompted(method="p_tuning")
    trainer(model, tmp_path, save_strategy="epoch").train()
    folder = tmp_path / "checkpoint-8"
    assert load_file(folder / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
    model.save_pretrained(tmp_path / "final")
    assert not (tmp_path / "final" / "training_parameters.safetensors").exists()
    with pytest.raises(ArtifactError, match=r"expected training_parameters\.safetensors"):
        model.load_adapter(tmp_path / "final", "default", is_trainable=True)


def test_the_best_checkpoint_is_restored(tmp_path):
    """In the parameters that the model had; the best epoch here is the first, for the loss is to be high."""
    model = prompted()
    run = trainer(
        model,
        tmp_path,
        num_train_epochs=3,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
    )
    weight = model.prompt_encoder["default"].embedding.weight
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[-1] + 1e-4
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)
    assert model.prompt_encoder["default"].embedding.weight is weight and weight.requires_grad


@pytest.mark.parametrize(
    ("method", "use_reentrant"),
    [
        pytest.param("prompt_tuning", True, marks=pytest.mark.slow),
        ("prefix", False),
        pytest.param("prompt_tuning", False, marks=pytest.mark.slow),
        pytest.param("prefix", True, marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing(tmp_path, method, use_reentrant):
    plain, recomputed = prompted(method=method), prompted(method=method)
    trainer(plain, tmp_path).train()
    trainer(
        recomputed,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    ).train()
    assert recomputes(recomputed.base_model)
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(recomputed)[name], value, atol=1e-4, rtol=0)


def test_metrics_see_all_columns_and_lengths_may_be_grouped(tmp_path):
    def accuracy(prediction):
        logits, labels = prediction
        assert logits.shape[1] == labels.shape[1] + P
        return {"accuracy": float((logits[:, P - 1 : -1].argmax(-1) == labels).mean())}

    run = trainer(prompted(), tmp_path, metrics=accuracy, train_sampling_strategy="group_by_length")
    run.train()
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1


def test_a_loss_of_ones_own_reads_the_logits(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, P - 1 : -1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return total / 32  # every token of the four rows is predicted

    own, usual = prompted(), prompted()
    run = trainer(own, tmp_path, logging_steps=1)
    run.compute_loss_func = loss
    run.train()
    trainer(usual, tmp_path, logging_steps=1).train()
    weights = [model.prompt_encoder["default"].embedding.weight for model in (own, usual)]
    torch.testing.assert_close(*weights, atol=1e-3, rtol=0)


def test_other_tasks(tmp_path):
    ids = records(8, spare=True)
    pairs = ids.map(lambda row: {"token_type_ids": [0] * 4 + [1] * 4, "labels": row["input_ids"][0] % 2})
    bert = build(tf.AutoModelForSequenceClassification, ENCODERS["bert"](), num_labels=2)
    classifier = prompted(base=bert, task="SEQ_CLS")
    run = trainer(classifier, tmp_path / "cls", data=pairs, save_strategy="epoch")
    assert run.label_names == ["labels"]
    run.train()
    assert "eval_loss" in run.evaluate()
    saved = load_file(tmp_path / "cls" / "checkpoint-4" / "adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
    spans = ids.remove_columns("labels").map(lambda row: {"start_positions": 1, "end_positions": 3})
    questions = prompted(base=build(tf.AutoModelForQuestionAnswering, ENCODERS["bert"]()), task="QUESTION_ANS")
    run = trainer(questions, tmp_path / "qa", data=spans)
    assert sorted(run.label_names) == ["end_positions", "start_positions"]
    run.train()
    writer = prompted(base=build(tf.AutoModelForSeq2SeqLM, SEQ2SEQ["t5"]()), task="SEQ_2_SEQ_LM")
    run = trainer(writer, tmp_path / "s2s", data=ids)
    run.train()
    assert "eval_loss" in run.evaluate()


def test_who_recognises_what():
    ours, theirs = prompted(base=causal("llama")), prompted(peft, base=causal("llama"))
    assert isinstance(ours, peft.PeftModelForCausalLM) and is_peft_model(ours)
    assert not isinstance(ours, peft.PeftModelForSeq2SeqLM | peft.PeftMixedModel)
    assert not isinstance(theirs, softprompt.PeftModel)
    assert type(ours) is softprompt.PeftModelForCausalLM is not ours.__class__
    assert isinstance(ours, softprompt.PeftModelForCausalLM)
    for method in ("prompt_tuning", "prefix", "p_tuning"):
        config = CONFIGS[method](softprompt, "CAUSAL_LM")
        expected = type(CONFIGS[method](peft, "CAUSAL_LM"))
        assert isinstance(config, expected) and isinstance(config, peft.PromptLearningConfig)
        assert not isinstance(config, peft.LoraConfig)


def test_what_is_recognised_is_still_itself():
    """Copies, pickles and ``dataclasses.replace`` look at ``__class__`` too."""
    config = CONFIGS["prompt_tuning"](softprompt, "CAUSAL_LM")
    changed = dataclasses.replace(config, num_virtual_tokens=7)
    assert type(changed) is softprompt.PromptTuningConfig and changed.num_virtual_tokens == 7
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) != changed  # noqa: S301
    model = prompted().eval()
    ids = torch.arange(3, 9)[None]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert type(other) is softprompt.PeftModelForCausalLM
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert type(model.__class__(tied(), config)) is softprompt.PeftModelForCausalLM
    assert "PeftModelForCausalLM(" in repr(model)


@pytest.mark.slow
def test_what_is_recognised_compiles():
    model, ids = prompted().eval(), torch.arange(3, 9)[None]
    assert isinstance(model, peft.PeftModel)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_peft_s_own_function_attaches_our_configuration_by_us():
    """TRL's ``peft_config=`` calls it; PEFT's own configurations and classes are as before."""
    ours = peft.get_peft_model(causal("llama"), CONFIGS["prompt_tuning"](softprompt, "CAUSAL_LM"), "mine")
    assert type(ours) is softprompt.PeftModelForCausalLM and ours.active_adapter == "mine"
    theirs = peft.get_peft_model(causal("llama"), CONFIGS["prompt_tuning"](peft, "CAUSAL_LM"))
    assert type(theirs) is peft.PeftModelForCausalLM
    lora = peft.get_peft_model(causal("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert type(lora) is peft.PeftModelForCausalLM and not isinstance(lora, softprompt.PeftModel)


def test_peft_loads_its_own_prompts_as_before(tmp_path):
    theirs = prompted(peft, base=causal("llama"))
    theirs.save_pretrained(tmp_path)
    isinstance(CONFIGS["prompt_tuning"](softprompt, "CAUSAL_LM"), peft.PeftConfig)
    loaded = peft.PeftModel.from_pretrained(causal("llama"), str(tmp_path))
    assert type(loaded) is peft.PeftModelForCausalLM
    causal("llama").save_pretrained(tmp_path / "base")
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path)
    assert type(peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))) is peft.PeftModelForCausalLM
