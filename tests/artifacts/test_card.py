from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import softprompt
from softprompt.artifacts import save_adapter
from softprompt.artifacts.card import model_card


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_front_matter_says_what_the_hub_searches_and_claims_no_licence(config, manifest):
    assert front_matter(model_card(config, manifest)) == {
        "library_name": "peft",
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["softprompt", "prompt-tuning"],
        "widget": [{"text": "Text : your text Label : "}],
    }


def test_a_published_card_has_licence_data_sets_and_metrics_and_loads_from_its_repository(config, manifest):
    measured = dataclasses.replace(
        manifest,
        metrics={"loss": 1.5, "validation": {"accuracy": 0.875, "loss": 0.4}},
        data={"validation": {"path": "validation.jsonl"}},
    )
    card = model_card(config, measured, repo_id="me/prompt", license="mit", datasets=["org/set"])
    front = ModelCard(card).data  # as huggingface_hub reads it
    assert (front.license, front.datasets, front.model_name) == ("mit", ["org/set"], "prompt")
    found = {
        each.metric_name: (each.metric_type, each.metric_value, each.dataset_name) for each in front.eval_results
    }
    assert found["accuracy"] == ("accuracy", 0.875, "validation.jsonl")
    assert found["loss"] == ("loss", 0.4, "validation.jsonl")
    ours, pefts = code_blocks(card)
    assert 'softprompt.load("me/prompt")' in ours
    assert 'PeftModel.from_pretrained(base, "me/prompt")' in pefts


def test_a_remark_on_the_metrics_is_no_number_of_the_hub(config, manifest):
    remark = "the prompt learnt nothing: validation accuracy 0.5 is not above 0.5, the share of the commonest label"
    noted = dataclasses.replace(manifest, metrics={"nothing_learnt": remark, "validation": {"accuracy": 0.5}})
    card = ModelCard(model_card(config, noted))
    assert [each.metric_name for each in card.data.eval_results] == ["accuracy"]
    assert f"## Results\n\nNote: {remark}.\n\n| name | value |" in card.text
    assert "nothing_learnt" not in str(card)


@pytest.mark.parametrize("base", ["/models/tiny", "../tiny", "a/b/c", "./runs/tiny", ""])
def test_a_path_is_no_base_model_of_the_hub_and_an_absolute_one_is_not_told(config, manifest, base):
    card = model_card(config, dataclasses.replace(manifest, base_model=base))
    assert "base_model" not in front_matter(card)
    assert base.removeprefix("/models/") in card
    assert "/models" not in card


def test_the_files_of_a_hub_model_are_called_by_its_id(config, manifest):
    path = "/home/me/.cache/huggingface/hub/models--org--tiny/snapshots/0123abcd"
    card = model_card(config, dataclasses.replace(manifest, base_model=path))
    assert front_matter(card)["base_model"] == "org/tiny"
    assert "/home" not in card


def test_the_card_tells_what_the_prompt_is(config, manifest):
    card = model_card(config, manifest)
    for expected in (
        "3 trained vectors",
        "Text : {{input}} Label : ",
        "`complaint`, `no complaint`",
        "| validation_accuracy | 0.875 |",
        "| learning_rate | 0.05 |",
        "| train.rows | 400 |",
        "| softprompt | 0.1.0 |",
    ):
        assert expected in card


def test_values_cannot_break_the_markdown(config, manifest):
    odd = dataclasses.replace(manifest, template="a ``` {{input}}", settings={"x": "1 | 2\n3"}, metrics={})
    card = model_card(config, odd)
    assert "````\na ``` {{input}}\n````" in card
    assert "| x | 1 \\| 2 3 |" in card
    assert "## Results" not in card


def test_several_fields_are_passed_as_a_mapping(config, manifest):
    card = model_card(config, dataclasses.replace(manifest, template="{{a}} and {{b}}"))
    assert 'prompt({"a": "…", "b": "…"})' in card
    card = model_card(config, dataclasses.replace(manifest, template="{{Tweet text}} {{b}}"))
    assert 'prompt({"Tweet text": "…", "b": "…"})' in card


@pytest.mark.parametrize(
    ("task_type", "expected"),
    [
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("TOKEN_CLS", "AutoModelForTokenClassification"),
        ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "AutoModel.from_pretrained"),
    ],
)
def test_without_a_manifest_the_code_fits_the_task(config, task_type, expected):
    card = model_card({**config, "task_type": task_type}, None)
    (code,) = code_blocks(card)
    compile(code, "card", "exec")
    assert expected in code
    assert "softprompt.load" not in card
    assert front_matter(card)["base_model"] == "org/tiny"


@pytest.mark.parametrize(
    ("task_type", "name"),
    [
        ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
        ("FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
        (None, "AutoPeftModel"),
    ],
)
def test_tasks_that_write_no_text_are_loaded_by_class(config, manifest, task_type, name):
    code = code_blocks(model_card({**config, "task_type": task_type}, manifest))[0]
    assert f'{name}.from_pretrained("path/to/this/folder")' in code
    assert name in softprompt.__all__


def test_the_bundled_model_is_loaded_from_the_package(config, manifest):
    card = model_card(config, dataclasses.replace(manifest, base_model="demo"))
    assert 'load_base("demo")' in code_blocks(card)[1]


def tiny_base(directory):
    words = {word: number for number, word in enumerate("<unk> Text : your text Label".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>").save_pretrained(
        directory
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(directory)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_the_peft_code_runs(tmp_path, config, tensors, manifest, capsys):
    pytest.importorskip("peft")
    base = str(tmp_path / "base")
    tiny_base(base)
    config = {**config, "base_model_name_or_path": base, "num_attention_heads": 2, "num_layers": 2}
    manifest = dataclasses.replace(manifest, base_model=base)
    save_adapter(tmp_path / "p", config, tensors, manifest, overwrite=False)
    code = code_blocks((tmp_path / "p" / "README.md").read_text())[1]
    code = code.replace("path/to/base", base)  # the card names no folder
    exec(code.replace("path/to/this/folder", str(tmp_path / "p")), {})  # noqa: S102 - our own
    assert capsys.readouterr().out.startswith("Text : your text Label :")
