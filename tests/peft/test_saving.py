"""Prompts to folders and back: names, selections, heads, the Hub, PEFT."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch

import softprompt
from oracles.families import causal
from oracles.peft_pair import base, batch
from softprompt import (
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from softprompt.errors import AdapterError, ArtifactError, ConfigError, FingerprintError
from softprompt.peft import saving

IDS = torch.tensor([[5, 6, 7, 8]])
HEADED = ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]


def prompted(task="CAUSAL_LM", names=("default",)):
    model = base(task)
    torch.manual_seed(4)
    attached = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=3), names[0])
    for i, name in enumerate(names[1:]):
        attached.add_adapter(name, PromptTuningConfig(num_virtual_tokens=4 + i))
    return attached.eval()


def shaken(model):
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".modules_to_save." in path:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    return model


def rows(model, name):
    return model.prompt_encoder[name].embedding.weight


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


OWN = ["README.md", "adapter_config.json", "adapter_model.safetensors", "softprompt.json"]


def test_every_prompt_has_its_folder(tmp_path):
    model = prompted(names=("default", "b", "c"))
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == sorted([*OWN, *(f"{n}/{f}" for n in "bc" for f in OWN)])
    loaded = PeftModel.from_pretrained(causal("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "b", "b")
    loaded.load_adapter(str(tmp_path), "renamed", subfolder="c")
    assert list(loaded.peft_config) == ["default", "b", "renamed"]
    assert loaded.active_adapter == "default"
    for name, source in (("default", "default"), ("b", "b"), ("renamed", "c")):
        assert torch.equal(rows(loaded, name), rows(model, source))
        model.set_adapter(source)
        loaded.set_adapter(name)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_nothing_is_written_behind_a_link_in_the_folder(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").symlink_to(tmp_path / "mine")
    (tmp_path / "out" / "other").symlink_to(tmp_path)
    model = prompted(names=("default", "other"))
    model.create_or_update_model_card(str(tmp_path / "out"))
    with pytest.raises(ArtifactError, match="other is a link"):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "out"}


def test_the_folders_are_those_of_peft(tmp_path):
    model = prompted(names=("default", "b"))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(causal("llama"), tmp_path)
        theirs.load_adapter(tmp_path / "b", "b")
        theirs.set_adapter("b")
    model.set_adapter("b")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_selection(tmp_path):
    model = prompted(names=("default", "b", "c"))
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert files(tmp_path) == [f"b/{name}" for name in OWN]
    with pytest.raises(AdapterError, match="Adapter x not found"):
        model.save_pretrained(tmp_path / "more", selected_adapters=["b", "x"])
    assert not (tmp_path / "more").exists()


def test_saving_again_replaces(tmp_path):
    model = prompted()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        rows(model, "default").mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        rows(PeftModel.from_pretrained(causal("llama"), tmp_path), "default"),
        rows(model, "default"),
    )
    assert files(tmp_path) == OWN


def test_the_saved_config_is_for_inference_and_names_the_base(tmp_path):
    model = prompted()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["inference_mode"] is True
    assert values["task_type"] == "CAUSAL_LM"
    assert model.peft_config["default"].inference_mode is False


@pytest.mark.parametrize("task", HEADED)
def test_trained_heads_load_in_peft(task, tmp_path):
    model = shaken(prompted(task))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base(task), tmp_path).eval()
        inputs = {k: v for k, v in batch(task, padded=False).items() if k != "labels"}
        expected = theirs(**inputs)[0]
    torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", HEADED)
def test_trained_heads_of_peft_load_here(task, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base(task), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
        shaken(theirs.eval()).save_pretrained(tmp_path)
        inputs = {k: v for k, v in batch(task, padded=False).items() if k != "labels"}
        expected = theirs(**inputs)[0]
    ours = PeftModel.from_pretrained(base(task), tmp_path).eval()
    torch.testing.assert_close(ours(**inputs)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["CAUSAL_LM", *HEADED])
def test_state_dicts_go_round(task):
    model, other = shaken(prompted(task)), prompted(task)
    with torch.no_grad():
        rows(model, "default").mul_(-1)
    state = get_peft_model_state_dict(model)
    assert state["prompt_embeddings"].shape == (3, 32)
    assert len(state) == (1 if task == "CAUSAL_LM" else 3)
    set_peft_model_state_dict(other, state)
    assert torch.equal(other(**batch(task))[0], model(**batch(task))[0])
    with pytest.raises(AdapterError, match="Adapter x not found"):
        get_peft_model_state_dict(model, adapter_name="x")
    with pytest.raises(AdapterError, match="Adapter x not found"):
        set_peft_model_state_dict(model, state, "x")


def test_a_state_dict_is_a_snapshot():
    model = prompted()
    state = get_peft_model_state_dict(model)
    before = state["prompt_embeddings"].clone()
    with torch.no_grad():
        rows(model, "default").mul_(2)
    assert torch.equal(state["prompt_embeddings"], before)


def test_the_keys_are_pefts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            base("SEQ_CLS"), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        )
        expected = set(peft.get_peft_model_state_dict(theirs))
    assert set(get_peft_model_state_dict(prompted("SEQ_CLS"))) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("prompt_embeddings"), "lacks prompt_embeddings"),
        (
            lambda s: s.update(prompt_embeddings=torch.zeros(3, 31)),
            r"is \[3, 31\], but this model needs \[3, 32\]",
        ),
        (lambda s: s.update(prompt_embeddings=torch.zeros(2, 32)), r"is \[2, 32\]"),
        (lambda s: s.update(prompt_embeddings=torch.zeros(6, 32)), r"is \[6, 32\]"),
        (
            lambda s: s.update(extra=torch.zeros(1)),
            "holds extra, which this model has no place for",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    model = prompted()
    before = rows(model, "default").detach().clone()
    state = {"prompt_embeddings": torch.ones(3, 32)}
    change(state)
    with pytest.raises(ArtifactError, match=message):
        set_peft_model_state_dict(model, state)
    assert torch.equal(rows(model, "default"), before)


def test_a_failed_load_leaves_no_prompt_behind(tmp_path):
    prompted("SEQ_CLS").save_pretrained(tmp_path / "good")
    state = shaken(prompted("SEQ_CLS"))
    state.save_pretrained(tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    config["modules_to_save"] = []
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file({"prompt_embeddings": torch.zeros(3, 32)}, tmp_path / "bad" / "adapter_model.safetensors")
    (tmp_path / "bad" / "softprompt.json").unlink()
    model = PeftModel.from_pretrained(base("SEQ_CLS"), tmp_path / "good")
    with pytest.raises(ArtifactError, match=r"lacks base_model\.classifier"):
        model.load_adapter(tmp_path / "bad", "b")
    assert list(model.peft_config) == ["default"]
    assert not any(".b." in name for name, _ in model.named_parameters())
    fresh = base("SEQ_CLS")
    with pytest.raises(ArtifactError):
        PeftModel.from_pretrained(fresh, tmp_path / "bad")
    assert list(fresh.state_dict()) == list(base("SEQ_CLS").state_dict())


def test_another_base_is_refused_for_further_prompts_too(tmp_path):
    prompted().save_pretrained(tmp_path)
    other = get_peft_model(causal("llama", seed=7), PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(FingerprintError, match="was made for"):
        other.load_adapter(tmp_path, "b")
    assert list(other.peft_config) == ["default"]
    other.load_adapter(tmp_path, "b", ignore_fingerprint=True)


def test_loaded_prompts_are_frozen_unless_asked(tmp_path):
    shaken(prompted("SEQ_CLS")).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(base("SEQ_CLS"), tmp_path)
    assert frozen.num_parameters(only_trainable=True) == 0
    further = PeftModel.from_pretrained(base("SEQ_CLS"), tmp_path, is_trainable=True)
    assert further.num_parameters(only_trainable=True) == 3 * 32 + 3 * 32 + 3
    frozen.thaw("default")
    assert frozen.num_parameters(only_trainable=True) == 3 * 32 + 3 * 32 + 3


def test_a_class_loads_only_its_task(tmp_path):
    prompted("SEQ_CLS").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="load it with PeftModelForSequenceClassification"):
        softprompt.PeftModelForCausalLM.from_pretrained(causal("llama"), tmp_path)
    loaded = softprompt.PeftModelForSequenceClassification.from_pretrained(base("SEQ_CLS"), tmp_path)
    assert type(loaded) is type(PeftModel.from_pretrained(base("SEQ_CLS"), tmp_path))


def test_a_pickle_is_written_where_it_is_asked_for_and_read_without_code(tmp_path):
    model = prompted()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in files(tmp_path)
    assert "adapter_model.safetensors" not in files(tmp_path)
    assert torch.load(tmp_path / "adapter_model.bin", weights_only=True).keys() == {"prompt_embeddings"}
    loaded = PeftModel.from_pretrained(causal("llama"), tmp_path)
    assert torch.equal(rows(loaded, "default"), rows(model, "default"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(causal("llama"), tmp_path)
    assert torch.equal(theirs.prompt_encoder.default.embedding.weight, rows(model, "default"))
    model.save_pretrained(tmp_path)
    assert "adapter_model.bin" not in files(tmp_path)


def test_a_changed_pickle_is_noticed(tmp_path):
    prompted().save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"prompt_embeddings": torch.ones(3, 32)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="with sha256"):
        PeftModel.from_pretrained(causal("llama"), tmp_path)


def test_unknown_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown arguments: save_embeddings"):
        prompted().save_pretrained(tmp_path / "out", save_embeddings=True)
    with pytest.raises(TypeError, match="converts LoRA"):
        prompted().save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion="x")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the Hub: keep what would be uploaded."""
    from huggingface_hub import HfApi

    sent = {}

    def create_repo(api, repo_id, **options):
        sent.update(created=repo_id, token=api.token, **options)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(api, *, repo_id, folder_path, **options):
        sent.update(repo=repo_id, files=files(Path(folder_path)), **options)
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_branch", lambda api, repo, **options: sent.update(options))
    return sent


def test_push_to_hub(hub):
    model = prompted(names=("default", "b"))
    address = model.push_to_hub("someone/prompt", private=True, token="secret", revision="v2")
    assert address == "https://hub/commit"
    assert (hub["created"], hub["repo"]) == ("someone/prompt", "someone/prompt")
    assert (hub["private"], hub["token"], hub["revision"], hub["branch"]) == (
        True,
        "secret",
        "v2",
        "v2",
    )
    assert hub["files"] == sorted([*OWN, *(f"b/{name}" for name in OWN)])


def test_what_transformers_takes_of_a_push(hub, monkeypatch):
    from huggingface_hub import HfApi, ModelCard

    keep, cards = HfApi.upload_folder, []

    def upload_folder(api, *, folder_path, **options):
        cards.append(ModelCard.load(Path(folder_path) / "README.md").data.tags)
        return keep(api, folder_path=folder_path, **options)

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    said = {"commit_message": "first", "commit_description": "of two", "create_pr": True}
    prompted().push_to_hub("someone/prompt", **said, tags=["mine"], max_shard_size="1GB")
    assert {name: hub[name] for name in said} == said
    assert "mine" in cards[0] and len(cards[0]) > 1


def test_a_configuration_is_pushed_alone(hub):
    config = prompted().peft_config["default"]
    assert config.push_to_hub("someone/prompt", private=True, token="t") == "https://hub/commit"
    assert (hub["created"], hub["private"], hub["token"], hub["files"]) == (
        *("someone/prompt", True, "t"),
        ["adapter_config.json"],
    )


def test_a_hub_out_of_reach_is_one_clear_error():
    model = prompted()
    for what in (model, model.peft_config["default"]):
        with pytest.raises(ArtifactError, match="could not upload to someone/prompt") as caught:
            what.push_to_hub("someone/prompt")
        assert "\n" not in str(caught.value)


def test_saving_can_push(hub, tmp_path):
    prompted().save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/prompt")
    assert hub["created"] == "someone/prompt"
    assert files(tmp_path) == OWN


def test_what_was_measured_is_not_said_of_rows_trained_further(tmp_path):
    model = causal("llama")
    ours = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2))
    manifest = dataclasses.replace(saving.manifest_of(ours, "default"), metrics={"accuracy": 0.9})
    ours.manifests["default"] = manifest
    ours.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(causal("llama"), tmp_path)
    assert frozen.manifests["default"].metrics == {"accuracy": 0.9}
    further = PeftModel.from_pretrained(causal("llama"), tmp_path, is_trainable=True)
    assert further.manifests["default"].metrics == {}
