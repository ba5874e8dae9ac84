"""Every example of the PromptTuningConfig document runs with ``peft`` replaced by ``softprompt``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers as tf

from oracles.families import CAUSAL, ENCODERS, SEQ2SEQ, H, build
from oracles.tokenizers import byte_bpe
from softprompt import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

SEEDS = Path(__file__).parents[2].parent / "shared" / "seeds"
BLOCK = re.compile(r'(?:```python|<syntaxhighlight lang="python">)\n(.*?)(?:```|</syntaxhighlight>)', re.S)
IDS = {"input_ids": torch.tensor([[5, 6, 7]])}


@pytest.fixture(scope="session")
def hub_ids(tmp_path_factory):
    """Return a folder with a tiny model and tokenizer for each hub id of the document."""
    root, words = tmp_path_factory.mktemp("hub"), byte_bpe()
    models = {
        "gpt2": (tf.AutoModelForCausalLM, CAUSAL["gpt2"]),
        "t5-base": (tf.AutoModelForSeq2SeqLM, SEQ2SEQ["t5"]),
        "bert-base-uncased": (tf.AutoModelForSequenceClassification, ENCODERS["bert"]),
    }
    for name, (loader, config) in models.items():
        build(loader, config(), vocab_size=len(words)).save_pretrained(root / name)
        words.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture
def run(hub_ids, tmp_path, monkeypatch):
    """Return a function that executes the one block whose text holds a marker."""
    found = sorted(SEEDS.glob("001*.txt"))
    if not found:
        pytest.skip("../shared/seeds/001* is absent")
    blocks = BLOCK.findall(found[0].read_text(encoding="utf-8"))
    assert len(blocks) == 8
    monkeypatch.chdir(tmp_path)

    def execute(marker, **names):
        (block,) = [block for block in blocks if marker in block]
        block = re.sub(r"\bfrom peft\b", "from softprompt", block)
        for name, folder in hub_ids.items():
            block = block.replace(f'"{name}"', repr(str(folder)))
        namespace = dict(names)
        exec(compile(block, marker, "exec"), namespace)  # noqa: S102 - the document is ours to run
        return namespace

    return execute


def test_the_signature(run):
    """The document's constructor arguments, in its order, with its defaults."""
    arguments = inspect.signature(PromptTuningConfig).parameters
    own = [name for name in arguments if name.startswith(("prompt_", "tokenizer_"))]
    assert own == [
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
        "prompt_sees_input",  # ours, behind the document's
        "prompt_tuning_init_prompt",
    ]
    assert arguments["prompt_tuning_init"].default is PromptTuningInit.RANDOM
    assert all(arguments[name].default is None for name in own[1:4])
    assert {"num_virtual_tokens", "task_type", "inference_mode"} <= set(arguments)


def test_the_import_path(run):
    names = run("from peft.tuners.prompt_tuning.config import")
    assert names["PromptTuningConfig"] is PromptTuningConfig
    assert names["PromptTuningInit"] is PromptTuningInit


def test_random(run, capsys):
    names = run("Configure with random initialization")
    assert capsys.readouterr().out == f"Trainable parameters: {20 * H}\n"
    assert names["peft_model"](**IDS).logits.shape[1] == 23


def first_rows(model, folder, text, length, name="default"):
    """Return what TEXT must start from: the text's embeddings, tiled or cut."""
    ids = tf.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    ids = (ids * length)[:length]
    expected = model.base_model.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(model.prompt_encoder[name].embedding.weight, expected)


def test_text(run, hub_ids):
    names = run("Initialize prompt from text")
    model = names["peft_model"]
    text = "Classify the sentiment of this text as positive or negative:"
    first_rows(model, hub_ids["t5-base"], text, 20)
    assert model(**IDS, labels=torch.tensor([[5, 2]])).loss.isfinite()
    assert model.num_parameters(only_trainable=True) == 20 * H


def test_sampled_vocabulary(run, hub_ids):
    model = tf.AutoModelForCausalLM.from_pretrained(hub_ids["gpt2"])
    table = {tuple(row) for row in model.get_input_embeddings().weight.tolist()}
    model = run("Sample random tokens", model=model)["peft_model"]
    rows = model.prompt_encoder["default"].embedding.weight
    assert rows.shape == (50, H)
    assert {tuple(row) for row in rows.tolist()} <= table


def test_tokenizer_kwargs(run, hub_ids):
    config = run("Provide additional tokenizer arguments")["config"]
    assert config.tokenizer_kwargs == {
        "use_fast": True,
        "add_special_tokens": True,
        "max_length": 512,
    }
    base = tf.AutoModelForSequenceClassification.from_pretrained(hub_ids["bert-base-uncased"])
    model = get_peft_model(base, config)
    first_rows(model, hub_ids["bert-base-uncased"], "Question: Is this statement true or false?", 10)


def test_two_tasks(run, hub_ids):
    model = run("Configure different prompts for different tasks")["peft_model"]
    assert list(model.peft_config) == ["summarization", "translation"]
    assert model.active_adapter == "summarization"
    first_rows(model, hub_ids["t5-base"], "summarize: ", 8, "summarization")
    first_rows(model, hub_ids["t5-base"], "translate English to French: ", 8, "translation")
    both = torch.cat([IDS["input_ids"]] * 2)
    out = model.generate(input_ids=both, adapter_names=["summarization", "translation"], max_new_tokens=3)
    assert out.shape[0] == 2


def test_saving_and_loading(run, capsys, tmp_path, hub_ids):
    names = run("Save configuration")
    assert names["loaded_config"] == names["config"]
    assert names["loaded_config"].prompt_tuning_init is PromptTuningInit.TEXT
    assert names["loaded_config"].task_type is TaskType.CAUSAL_LM
    assert capsys.readouterr().out == "Loaded init method: TEXT\n"
    assert (tmp_path / "prompt_tuning_config" / "adapter_config.json").is_file()
