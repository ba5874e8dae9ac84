"""Every method's keys and shapes against PEFT, and folders of each method both ways."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from peft.utils import load_peft_weights
from transformers import LlamaConfig, LlamaForCausalLM

from oracles.slow import only
from softprompt.artifacts import load_adapter, save_adapter
from softprompt.artifacts.layout import LAYOUTS, OUR_KEYS, PROMPT_KEY
from softprompt.errors import ArtifactError
from softprompt.prompts import PeftType

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

THEIRS = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2
    ),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "CARTRIDGE": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "CPT": peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3]),
}


def tiny_llama():
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def test_every_method_has_its_layout():
    assert set(LAYOUTS) == set(PeftType)
    assert set(THEIRS) == set(PeftType) - {PeftType.EXTENDED_PROMPT_TUNING}


@pytest.mark.parametrize("kind", THEIRS)
def test_the_keys_are_pefts(kind):
    fields = {item.name for item in dataclasses.fields(THEIRS[kind])}
    assert fields == LAYOUTS[PeftType(kind)].keys


def test_the_extended_keys_are_pefts_and_ours():
    plain = LAYOUTS[PeftType.PROMPT_TUNING].keys
    assert LAYOUTS[PeftType.EXTENDED_PROMPT_TUNING].keys == plain | OUR_KEYS


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", only(["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"], THEIRS))
def test_a_folder_of_each_method_goes_both_ways(tmp_path, kind, safe):
    model = peft.get_peft_model(tiny_llama(), dataclasses.replace(THEIRS[kind]))
    model.save_pretrained(str(tmp_path / "theirs"), safe_serialization=safe)
    stored = load_adapter(tmp_path / "theirs")
    assert stored.config["peft_type"] == kind
    save_adapter(tmp_path / "ours", stored.config, stored.tensors, overwrite=False)
    again = load_adapter(tmp_path / "ours")
    assert again.config == stored.config
    theirs = load_peft_weights(str(tmp_path / "ours"), device="cpu")
    assert theirs.keys() == stored.tensors.keys()
    assert all(torch.equal(theirs[name], stored.tensors[name]) for name in theirs)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    weight = loaded.prompt_encoder["default"].embedding.weight
    assert torch.equal(weight, stored.tensors[PROMPT_KEY])


def multitask(**changes):
    config = {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "num_transformer_submodules": 1,
        "token_dim": 8,
        "num_tasks": 2,
        "num_ranks": 4,
        **changes,
    }
    shapes = {
        "prompt_embeddings": (3, 8),
        "prefix_task_cols": (2, 3, 4),
        "prefix_task_rows": (2, 4, 8),
    }
    return config, {name: torch.ones(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("prefix_task_cols", None, "expected a tensor 'prefix_task_cols'"),
        ("prefix_task_rows", None, "expected a tensor 'prefix_task_rows'"),
        ("prefix_task_cols", torch.ones(1, 3, 4), r"prefix_task_cols \[2, 3, 4\].*\[1, 3, 4\]"),
        ("prefix_task_rows", torch.ones(2, 4, 7), r"prefix_task_rows \[2, 4, 8\].*\[2, 4, 7\]"),
        ("prefix_task_rows", torch.full((2, 4, 8), torch.nan), "expected finite numbers"),
        ("prefix_task_rows", torch.ones(2, 4, 8).long(), "prefix_task_rows .*int64"),
    ],
)
def test_the_factors_of_a_multitask_prompt_are_checked(tmp_path, name, value, expected):
    config, tensors = multitask()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(ArtifactError, match=expected):
        save_adapter(tmp_path / "p", config, tensors, overwrite=False)


def test_the_width_of_factors_is_the_prompts_where_the_config_leaves_it_open(tmp_path):
    config, tensors = multitask(token_dim=None)
    save_adapter(tmp_path / "p", config, tensors, overwrite=False)
    tensors["prefix_task_rows"] = torch.ones(2, 4, 7)
    with pytest.raises(ArtifactError, match="prefix_task_rows"):
        save_adapter(tmp_path / "q", config, tensors, overwrite=False)


def test_a_target_prompt_loads_without_its_source_file(tmp_path):
    config, tensors = multitask(
        prompt_tuning_init="AVERAGE_SOURCE_TASKS",
        prompt_tuning_init_state_dict_path=str(tmp_path / "gone.safetensors"),
    )
    save_adapter(tmp_path / "p", config, tensors, overwrite=False)
    assert load_adapter(tmp_path / "p").config == config


@pytest.mark.parametrize("submodules", [1, 2])
def test_the_keys_and_values_of_a_prefix_prompt_have_p_rows(tmp_path, submodules):
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 3,
        "num_transformer_submodules": submodules,
        "num_layers": 2,
        "token_dim": 4,
    }
    save_adapter(tmp_path / "p", config, {PROMPT_KEY: torch.ones(3, 16)}, overwrite=False)
    with pytest.raises(ArtifactError, match=r"\[3, 16\] .num_virtual_tokens, num_layers \* 2"):
        save_adapter(tmp_path / "q", config, {PROMPT_KEY: torch.ones(3, 8)}, overwrite=False)


def test_a_key_of_another_method_is_refused(tmp_path, config, tensors):
    with pytest.raises(ArtifactError, match="num_ranks"):
        save_adapter(tmp_path / "p", {**config, "num_ranks": 1}, tensors, overwrite=False)
