"""The public names, in order, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import softprompt

PEFT_NAMES = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "compose_cartridge_adapters",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "prompt_embeddings_from_past_key_values",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
OWN_NAMES = [
    "Baseline",
    "Bounds",
    "Comparison",
    "DistillSettings",
    "Ensemble",
    "Generation",
    "GenerationOptions",
    "Inspection",
    "ModulesToSaveWrapper",
    "MultitaskPromptEmbedding",
    "PromptLearningConfig",
    "Report",
    "Serving",
    "SoftPromptError",
    "Sweep",
    "SweepSettings",
    "TuneSettings",
    "TunedPrompt",
    "TuningConfig",
    "average_prompts",
    "compare",
    "concatenate_prompts",
    "convert",
    "distill",
    "evaluate",
    "inspect_prompt",
    "load",
    "load_many",
    "similar_prompts",
    "subtract_prompts",
    "sweep",
    "tune",
]
NAMES = sorted([*PEFT_NAMES, *OWN_NAMES])
OPTIONAL = ["matplotlib", "fastapi", "datasets", "pyarrow", "peft"]


def test_peft_s_paths_have_cartridge_helpers_and_no_names_of_torch():
    from softprompt.tuners import cartridge

    theirs = importlib.import_module("peft.tuners.cartridge.utils")
    ours = importlib.import_module("softprompt.tuners.cartridge.utils")
    helpers = [
        name for name in vars(theirs) if name.startswith(("initialize_kv", "prompt_embeddings_from", "compose_"))
    ]
    assert len(helpers) == 4
    assert all(getattr(ours, name) is getattr(softprompt, name) for name in helpers)
    assert not {"Tensor", "torch", "ConfigError", "dataclass"} & set(dir(cartridge))


def test_the_public_names_in_order():
    assert softprompt.__all__ == NAMES
    assert set(NAMES) <= set(dir(softprompt))
    for name in NAMES:
        value = getattr(softprompt, name)
        assert isinstance(value, dict) or value.__name__ == name


def test_there_are_no_others():
    public = {
        name
        for name, value in vars(softprompt).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= set(NAMES)
    with pytest.raises(AttributeError, match="no attribute 'tuen'"):
        _ = softprompt.tuen


def test_the_names_of_peft_are_pefts():
    import peft

    assert all(hasattr(peft, name) for name in PEFT_NAMES)


def test_types_see_the_same_names():
    """What is imported for type checkers is what is imported at run time, from the same place."""
    source = Path(softprompt.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert sorted(seen) == NAMES
    for name, module in seen.items():
        found = getattr(importlib.import_module(f"softprompt.{module}"), name)
        assert found is getattr(softprompt, name)


USED = ["get_peft_model", "PeftModel", "AutoPeftModel", "PromptTuningConfig", "TunedPrompt"]


def loaded(*uses):
    """The top-level modules of a new interpreter that imports softprompt, and then uses some names after others."""
    show = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    steps = ["import sys, softprompt", *(f"for name in {names}: getattr(softprompt, name)" for names in uses)]
    code = "\n".join(f"{step}\n{show}" for step in steps)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in ran.stdout.splitlines()]


def test_importing_softprompt_waits_for_nothing_heavy():
    assert not loaded()[0] & {"torch", "transformers", "sklearn", *OPTIONAL}


@pytest.mark.slow
def test_no_public_name_imports_plots_servers_or_data_sets():
    """sklearn brings pandas and pyarrow, transformers' optimizers bring peft, where installed."""
    _, some, every = loaded(USED, "softprompt.__all__")
    assert "torch" in some
    assert not some & {"sklearn", *OPTIONAL}
    assert not every & {"matplotlib", "fastapi", "datasets"}


def test_the_second_import_path():
    from softprompt.tuners.prompt_tuning import PromptEmbedding
    from softprompt.tuners.prompt_tuning.config import PromptTuningConfig, PromptTuningInit

    assert PromptEmbedding is softprompt.PromptEmbedding
    assert PromptTuningConfig is softprompt.PromptTuningConfig
    assert PromptTuningInit is softprompt.PromptTuningInit


def test_the_second_import_path_of_every_method():
    for method, names in {
        "multitask_prompt_tuning": [
            "MultitaskPromptEmbedding",
            "MultitaskPromptTuningConfig",
            "MultitaskPromptTuningInit",
        ],
        "p_tuning": ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"],
        "cpt": ["CPTConfig", "CPTEmbedding"],
        "cartridge": ["CartridgeConfig", "CartridgeEncoder"],
        "prefix_tuning": ["PrefixTuningConfig", "PrefixEncoder"],
    }.items():
        theirs = importlib.import_module(f"peft.tuners.{method}")
        for name in names:
            config, model = (
                importlib.import_module(f"softprompt.tuners.{method}{part}") for part in (".config", ".model")
            )
            ours = importlib.import_module(f"softprompt.tuners.{method}")
            assert hasattr(theirs, name)
            assert getattr(ours, name) is getattr(softprompt, name)
            assert hasattr(config, name) or hasattr(model, name)
