"""The arguments and functions of PEFT's interface, and what they do to a prompt."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import softprompt
from oracles.checkpointing import recompute, recomputes
from oracles.families import causal
from oracles.peft_pair import base, batch
from oracles.slow import only
from softprompt import (
    ModulesToSaveWrapper,
    PeftModel,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from softprompt.errors import AdapterError, ArtifactError, ConfigError
from softprompt.peft.loading import Loading

IDS = torch.tensor([[5, 6, 7, 8]])
KEY = "prompt_embeddings"


def prompted(task="CAUSAL_LM"):
    torch.manual_seed(4)
    return get_peft_model(base(task), PromptTuningConfig(task_type=task, num_virtual_tokens=3)).eval()


@pytest.fixture
def folder(tmp_path):
    prompted().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def hub(monkeypatch, folder):
    """Stand in for the Hub: give the folder for any repository, and keep what was asked for."""
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr("softprompt.artifacts.peft_folder.snapshot_download", snapshot_download)
    return asked


def test_what_changes_nothing_is_taken_in_silence(folder):
    loaded = PeftModel.from_pretrained(
        base("CAUSAL_LM"), folder, autocast_adapter_dtype=False, low_cpu_mem_usage=True, use_safetensors=True
    )
    loaded.load_adapter(folder, "b", autocast_adapter_dtype=True, low_cpu_mem_usage=True)
    assert get_peft_model_state_dict(loaded)[KEY].dtype == torch.float32
    with pytest.warns(UserWarning, match="Ephemeral GPU offloading is not supported"):
        PeftModel.from_pretrained(base("CAUSAL_LM"), folder, ephemeral_gpu_offload=True)


def test_what_concerns_no_prompt_is_named_in_a_warning(folder):
    with pytest.warns(UserWarning, match="torch_dtype: not used for a prompt, as in PEFT"):
        PeftModel.from_pretrained(base("CAUSAL_LM"), folder, torch_dtype=torch.float16)


def test_options_of_the_download_reach_the_hub(hub):
    options = {"revision": "v1", "cache_dir": "/nowhere", "token": "secret", "force_download": True}
    PeftModel.from_pretrained(base("CAUSAL_LM"), "some/prompt", **options)
    assert options.items() <= hub.items()
    PeftModel.from_pretrained(base("CAUSAL_LM"), "some/prompt", use_auth_token="old")
    assert hub["token"] == "old"
    prompted().load_adapter("some/prompt", "b", token="another")
    assert hub["token"] == "another"
    assert load_peft_weights("some/prompt", revision="v2").keys() == {KEY}
    assert hub["revision"] == "v2"


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({"torch_device": "meta"}, "meta"),
        ({"device_map": {"": "meta"}}, "meta"),
        ({"device_map": {"model": "cpu", "prompt_encoder": "meta"}}, "meta"),
        ({"device_map": "meta"}, "meta"),
        ({"device_map": "auto"}, "cpu"),
        ({"device_map": "meta", "torch_device": "cpu"}, "cpu"),
    ],
)
def test_a_device_places_the_prompt_and_not_the_base(folder, options, device):
    loaded = PeftModel.from_pretrained(base("CAUSAL_LM"), folder, **options)
    assert loaded.prompt_encoder.default.embedding.weight.device.type == device
    assert loaded.base_model.device.type == "cpu"


def test_memory_and_folder_spread_the_base_as_accelerate_does(folder, tmp_path):
    pytest.importorskip("accelerate")
    model = base("CAUSAL_LM")
    expected = PeftModel.from_pretrained(base("CAUSAL_LM"), folder)(IDS).logits
    loaded = PeftModel.from_pretrained(
        model,
        folder,
        device_map="auto",
        max_memory={"cpu": 60_000, "disk": 10**9},
        offload_folder=str(tmp_path / "o"),
    )
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(loaded(IDS).logits, expected)
    with pytest.raises(ConfigError, match="Cannot use `offload_folder` when `offload_dir` is specified"):
        PeftModel.from_pretrained(base("CAUSAL_LM"), folder, offload_folder="a", offload_dir="b")


def test_a_given_configuration_is_the_models_own(folder):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    loaded = PeftModel.from_pretrained(base("CAUSAL_LM"), folder, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert config.token_dim == 32
    with pytest.raises(ValueError, match="The input config must be a PeftConfig, got"):
        PeftModel.from_pretrained(base("CAUSAL_LM"), folder, config={})


def test_key_mapping_renames_trained_modules_and_the_first_pattern_counts(tmp_path):
    model = prompted("SEQ_CLS")
    state = get_peft_model_state_dict(model)
    state = {name.replace("base_model.classifier", "base_model.old_head"): value for name, value in state.items()}
    mapped = Loading.of({"key_mapping": {"^old_head": "classifier", "classifier": "never"}})
    model.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "softprompt.json").unlink()
    with pytest.raises(ArtifactError, match="no place for"):
        PeftModel.from_pretrained(base("SEQ_CLS"), tmp_path)
    loaded = PeftModel.from_pretrained(base("SEQ_CLS"), tmp_path, key_mapping={"^old_head": "classifier"})
    assert torch.equal(loaded(**batch("SEQ_CLS"))[0], model(**batch("SEQ_CLS"))[0])
    assert mapped.read(tmp_path).tensors.keys() == get_peft_model_state_dict(model).keys()


def test_loading_into_a_prompt_that_is_there_replaces_its_values(folder):
    model = prompted()
    with torch.no_grad():
        model.prompt_encoder.default.embedding.weight.zero_()
    result = model.load_adapter(folder, "default")
    assert torch.equal(get_peft_model_state_dict(model)[KEY], load_peft_weights(folder)[KEY])
    assert result.missing_keys == result.unexpected_keys == []


def test_sizes_that_differ_may_be_ignored_with_a_warning():
    model = prompted()
    before = get_peft_model_state_dict(model)[KEY]
    with pytest.warns(UserWarning, match=r"prompt_embeddings is \[2, 32\], the model needs \[3, 32\]"):
        set_peft_model_state_dict(model, {KEY: torch.zeros(2, 32)}, ignore_mismatched_sizes=True)
    assert torch.equal(get_peft_model_state_dict(model)[KEY], before)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_gathered_state_dict_is_saved_in_place_of_the_models(task, tmp_path):
    model = prompted(task)
    gathered = {name: value + 1 for name, value in model.state_dict().items()}
    expected = {name: value + 1 for name, value in get_peft_model_state_dict(model).items()}
    found = get_peft_model_state_dict(model, state_dict=gathered)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    model.save_pretrained(tmp_path, state_dict=gathered, save_function=None)
    assert torch.equal(load_peft_weights(tmp_path)[KEY], expected[KEY])
    assert torch.equal(get_peft_model_state_dict(model)[KEY] + 1, expected[KEY])


def test_only_the_main_process_writes(tmp_path):
    prompted().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_compiled_model_gives_its_prompt():
    model = prompted()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(
        get_peft_model_state_dict(compiled, unwrap_compiled=True)[KEY], get_peft_model_state_dict(model)[KEY]
    )


def test_embedding_layers_are_saved_where_asked_for_and_must_be_the_bases_own(tmp_path):
    model = prompted()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    saved = load_peft_weights(tmp_path)
    assert "base_model.model.embed_tokens.weight" in saved
    loaded = PeftModel.from_pretrained(base("CAUSAL_LM"), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    other = base("CAUSAL_LM")
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight, and this base's differs"):
        PeftModel.from_pretrained(other, tmp_path, ignore_fingerprint=True)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_bases_state_dict_has_its_own_names_and_goes_back(task):
    plain = base(task).state_dict()
    model = prompted(task)
    state = get_base_model_state_dict(model)
    assert state.keys() == plain.keys()
    kept = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.add_(1)
    set_base_model_state_dict(model, kept)
    assert all(torch.equal(value, kept[name]) for name, value in get_base_model_state_dict(model).items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        set_base_model_state_dict(model, kept | {"x": torch.zeros(1)})
    assert set_base_model_state_dict(model, {}, strict=False).missing_keys == list(plain)


@pytest.mark.parametrize("name", ["merge_and_unload", "merge_adapter", "unmerge_adapter", "unload"])
def test_merging_is_refused_as_pefts_with_the_way_that_works(name):
    model = prompted()
    assert not hasattr(model, name)
    for kind in (AttributeError, TypeError):
        with pytest.raises(kind, match="convert --to extended-vocab"):
            getattr(model, name)()


def test_what_peft_says_of_prompts():
    model = prompted("SEQ_CLS")
    with pytest.raises(
        TypeError, match="Setting `requires_grad` is not supported for prompt learning methods like"
    ):
        model.set_requires_grad("default")
    for name in ("get_layer_status", "get_model_status"):
        with pytest.raises(TypeError, match=rf"{name}\(\) got an invalid PeftModel instance"):
            getattr(model, name)()
        with pytest.raises(TypeError, match=rf"{name}\(\) got an invalid PeftModel instance"):
            getattr(softprompt, name)(model)
    assert model.supports_lora_conversion() is False
    assert model.peft_type == "PROMPT_TUNING"
    assert model.modules_to_save == {"classifier", "score"}
    assert prompted().modules_to_save is None
    assert isinstance(model.base_model.classifier, ModulesToSaveWrapper)
    with pytest.raises(TypeError, match="mixed=True"):
        get_peft_model(base("CAUSAL_LM"), PromptTuningConfig(num_virtual_tokens=2), mixed=True)


def test_the_revision_of_the_base_is_kept():
    config = PromptTuningConfig(num_virtual_tokens=2)
    model = get_peft_model(base("CAUSAL_LM"), config, revision="v3", low_cpu_mem_usage=True)
    assert model.peft_config["default"].revision == "v3"
    assert isinstance(model, PeftModelForCausalLM)


def test_the_active_prompt_may_stay_frozen():
    model = prompted("SEQ_CLS")
    model.set_adapter("default", inference_mode=True)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.set_adapter("default")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("reentrant", only([True], [True, False]))
def test_gradients_reach_the_prompt_through_checkpoints(reentrant):
    def gradient(checkpointing):
        model = prompted().train()
        if checkpointing:
            model.prepare_model_for_gradient_checkpointing(model)
            recompute(model, {"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        return model.prompt_encoder.default.embedding.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_preparing_for_quantised_training_freezes_and_widens():
    model = causal("llama").to(torch.bfloat16)
    assert prepare_model_for_kbit_training(model) is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not recomputes(model)


def test_preparing_a_quantised_model_turns_checkpointing_on():
    model = causal("llama")
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert recomputes(model)


def test_a_one_task_prompt_asks_for_its_task_as_in_peft():
    from softprompt import MultitaskPromptTuningConfig

    model = get_peft_model(base("CAUSAL_LM"), MultitaskPromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        model(IDS)
    model(IDS, task_ids=0)


def test_a_prefix_is_attached_wherever_there_are_layers_and_run_where_they_read_it():
    single = base("SEQ_CLS")
    model = get_peft_model(single, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    assert isinstance(model.prompt_encoder["default"], nn.Module)


def test_after_the_last_prompt_was_deleted_there_may_be_another():
    model = prompted("SEQ_CLS")
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match="no prompt is attached"):
        model.active_peft_config  # noqa: B018 - reading it raises
    model.add_adapter("b", PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    model.set_adapter("b")
    assert model(**batch("SEQ_CLS")).logits.shape[0] == len(batch("SEQ_CLS")["input_ids"])


@pytest.mark.parametrize("method", ["PromptTuningConfig", "MultitaskPromptTuningConfig", "PrefixTuningConfig"])
def test_a_prompt_for_every_row_is_what_peft_hands_the_base(method):
    tasks = {"num_tasks": 2} if method.startswith("Multitask") else {}
    ids = {"task_ids": torch.tensor([0, 1, 0])} if tasks else {}
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **tasks}
    model = base("CAUSAL_LM")
    ours = get_peft_model(copy.deepcopy(model), getattr(softprompt, method)(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), getattr(peft, method)(**options))
        peft.set_peft_model_state_dict(theirs, softprompt.get_peft_model_state_dict(ours))
    got, expected = ours.get_prompt(3, **ids), theirs.get_prompt(3, **ids)
    if not isinstance(got, torch.Tensor):
        got, expected = (torch.stack([layer.keys for layer in each.layers]) for each in (got, expected))
    torch.testing.assert_close(got, expected)
    assert ours.word_embeddings is ours.base_model.get_input_embeddings()
    assert ours.base_model_torch_dtype == theirs.base_model_torch_dtype


def test_a_folder_has_one_revision_and_may_have_no_subfolder(folder):
    model = PeftModel.from_pretrained(base("CAUSAL_LM"), folder, revision="main", subfolder="")
    model.load_adapter(folder, "other", revision="main", subfolder="")
    assert set(model.peft_config) == {"default", "other"}


def test_the_card_of_a_run_is_written_or_added_to(tmp_path):
    model = prompted()
    model.create_or_update_model_card(tmp_path / "new")
    assert "library_name: peft" in (tmp_path / "new" / "README.md").read_text()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A run\n")
    model.create_or_update_model_card(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert "# A run" in written and "license: mit" in written and "library_name: peft" in written


def test_tables_of_types_and_a_configuration_of_values():
    values = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    assert softprompt.get_peft_config(values) == softprompt.PrefixTuningConfig(num_virtual_tokens=3)
    assert softprompt.PEFT_TYPE_TO_CONFIG_MAPPING["PREFIX_TUNING"] is softprompt.PrefixTuningConfig
    assert softprompt.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"] is softprompt.PeftModelForCausalLM


class Nested(torch.nn.Module):
    """A module whose parts have the names of an old, or a new, class of transformers."""

    def __init__(self, path):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"vocab_size": 10}
        parts = torch.nn.ModuleList([torch.nn.Linear(10, 10) for _ in range(2)])
        for name in reversed(path.split(".")):
            parts = torch.nn.ModuleDict({name: parts})
        self.inside = parts


@pytest.mark.parametrize("saved", ["model.layers", "model.language_model.layers"])
@pytest.mark.parametrize("loaded", ["model.layers", "model.language_model.layers"])
def test_a_prefix_loads_whatever_the_names_of_its_layers_are(saved, loaded, tmp_path):
    sizes = {"num_layers": 2, "token_dim": 10, "num_attention_heads": 2}
    config = softprompt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **sizes)
    model = get_peft_model(Nested(saved), config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Nested(loaded), tmp_path)
    weights = (each.prompt_encoder["default"].embedding.weight for each in (model, again))
    assert torch.equal(*weights)
