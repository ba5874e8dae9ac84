from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from oracles.slow import only
from oracles.solo import solo
from oracles.tuned import untrained
from softprompt.artifacts import Manifest
from softprompt.backbone import Fingerprint, load_base
from softprompt.errors import (
    ArtifactError,
    BackboneError,
    ConfigError,
    ContextOverflowError,
    DataError,
    FingerprintError,
    OutputExistsError,
    TemplateError,
)
from softprompt.generation import GenerationOptions, Request
from softprompt.inference import load
from softprompt.prompts import PromptTuningConfig

TEXTS = ["the cat", "a", "a much longer text, with the words at the end"]
CLASSES = {"task": "classification", "labels": ("good", "bad thing")}


def make(folder, *, length=4, seed=1, **changes):
    base = load_base(folder)
    seq2seq = bool(base.model.config.is_encoder_decoder)
    torch.manual_seed(seed)
    config = PromptTuningConfig(num_virtual_tokens=length, task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM")
    values = {
        "template": "{{input}}",
        "task": "generation",
        "labels": None,
        "base_model": str(folder),
        "base_fingerprint": Fingerprint.of(base.model).to_dict(),
        "max_source_length": 60,
        "max_target_length": 12,
        "dtype": "float32",
        "seq2seq": seq2seq,
        **changes,
    }
    return untrained(base, config, Manifest(**values))


@pytest.fixture(params=only(["llama", "t5"], ["llama", "bart", "t5"]))
def folder(request, folders):
    return folders / request.param


@pytest.fixture
def llama_folder(folders):
    return folders / "llama"


@torch.no_grad()
def greedy_oracle(prompt, source, count):
    """Append the likeliest token, running the whole unpadded row of embeddings each time."""
    model = prompt.base.model
    embed, virtual = model.get_input_embeddings(), prompt.prompt().input
    ids = list(source)
    for _ in range(count):
        rows = torch.cat([virtual, embed(torch.tensor(ids))]).unsqueeze(0)
        ids.append(int(model(inputs_embeds=rows).logits[0, -1].argmax()))
    return ids[len(source) :]


def test_greedy_answers_are_those_of_the_prompted_rows_one_by_one(llama_folder):
    prompt = make(llama_folder)
    for text, answer in zip(TEXTS, prompt.generate(TEXTS, max_new_tokens=6), strict=True):
        source, _ = prompt.rows.source({"input": text})
        assert answer.text == prompt.rows.decode(greedy_oracle(prompt, source, 6))
        assert answer.input_token_count == len(source)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"num_beams": 2}, marks=pytest.mark.slow),
        {"decoding_method": "SAMPLING", "seed": 5, "repetition_penalty": 1.2},
    ],
)
def test_a_batch_behind_a_prompt_gives_the_solo_answers(folder, settings):
    prompt = make(folder)
    together = prompt.generate(TEXTS, max_new_tokens=8, **settings)
    assert together == [prompt.generate(text, max_new_tokens=8, **settings)[0] for text in TEXTS]
    assert together == prompt.generate(TEXTS, max_new_tokens=8, batch_size=2, **settings)


def test_the_prompt_matters_and_can_be_left_out(folder):
    prompt = make(folder)
    sources = [prompt.rows.source({"input": text})[0] for text in TEXTS]
    options = GenerationOptions(max_new_tokens=8)
    alone = prompt.generate_rows(sources, options, without_prompt=True)
    assert alone != prompt.generate_rows(sources, options)
    decode = prompt.rows.decode
    requests = [Request(source, options=options, decode=decode) for source in sources]
    assert alone == [solo(prompt.base, request) for request in requests]


def test_label_scores_are_those_of_one_row_at_a_time(folder, answer_log_prob):
    prompt = make(folder, **CLASSES)
    found = prompt.classify(TEXTS)
    model = prompt.base.model
    for text, each in zip(TEXTS, found, strict=True):
        source, _ = prompt.rows.source({"input": text})
        expected = {
            label: answer_log_prob(model, prompt.prompt().input, source, prompt.rows.label(label))
            for label in CLASSES["labels"]
        }
        assert each.scores == pytest.approx(expected, rel=2e-6, abs=5e-5)
        assert each.label == max(expected, key=expected.get)
        total = sum(math.exp(value) for value in expected.values())
        share = math.exp(expected["good"]) / total
        assert each.probabilities["good"] == pytest.approx(share, abs=1e-4)
        assert json.dumps(each.to_dict())


def test_calling_a_classifier_gives_the_best_label(llama_folder):
    prompt = make(llama_folder, **CLASSES)
    labels = [each.label for each in prompt.classify(TEXTS)]
    assert prompt(TEXTS) == labels
    assert prompt(TEXTS[0]) == labels[0]
    assert prompt({"input": TEXTS[1]}) == labels[1]
    assert prompt([]) == []


def test_calling_a_generator_gives_text_of_at_most_the_target_length(llama_folder):
    prompt = make(llama_folder, max_target_length=5)
    assert prompt(TEXTS[0]) == prompt.generate(TEXTS[0], max_new_tokens=5)[0].text


def test_labels_can_be_chosen_at_the_call_and_are_needed(llama_folder):
    prompt = make(llama_folder)
    with pytest.raises(ConfigError, match="no labels"):
        prompt.classify("x")
    assert prompt.classify("x", labels=["u", "v", "w"])[0].label in {"u", "v", "w"}


def test_normalised_scores_are_per_token(llama_folder):
    prompt = make(llama_folder, **CLASSES)
    raw, each = (prompt.classify("x", normalize=n)[0].scores for n in (False, True))
    for label in CLASSES["labels"]:
        assert each[label] == pytest.approx(raw[label] / len(prompt.rows.label(label)))


def test_a_bare_text_needs_a_template_of_one_field(llama_folder):
    prompt = make(llama_folder, template="{{premise}} / {{claim}}", **CLASSES)
    with pytest.raises(TemplateError, match="fields premise, claim"):
        prompt("x")
    assert prompt({"premise": "x", "claim": "y"}) in CLASSES["labels"]


def test_a_long_input_is_cut_and_says_so(llama_folder):
    prompt = make(llama_folder, max_source_length=10, **CLASSES)
    assert [a.input_cut for a in prompt.generate(["ab", "z" * 50])] == [False, True]
    assert [a.input_cut for a in prompt.classify(["ab", "z" * 50])] == [False, True]


def test_what_does_not_fit_the_context_is_refused_with_the_numbers(llama_folder):
    prompt = make(llama_folder, length=60)
    with pytest.raises(ContextOverflowError, match="60 virtual tokens"):
        prompt.generate(TEXTS[2], max_new_tokens=20)


def test_an_input_without_tokens_is_refused(folder):
    prompt = make(folder, **CLASSES)
    with pytest.raises(DataError, match="input 2 has no tokens"):
        prompt.generate(["a", ""])
    with pytest.raises(DataError, match="input 1 has no tokens"):
        prompt.classify("")


def test_unknown_generation_settings_are_refused(llama_folder):
    prompt = make(llama_folder)
    with pytest.raises(ConfigError, match="did you mean 'top_k'"):
        prompt.generate("x", topk=3)
    with pytest.raises(ConfigError, match="got both"):
        prompt.generate("x", options=GenerationOptions(), num_beams=2)


def test_each_prompt_on_one_model_answers_for_itself(llama_folder):
    first = make(llama_folder, **CLASSES)
    torch.manual_seed(8)
    second = untrained(first.base, replace(first.config), first.manifest)
    lone = make(llama_folder, **CLASSES)
    assert first.generate(TEXTS) == lone.generate(TEXTS)
    assert first.generate(TEXTS) != second.generate(TEXTS)
    assert first.classify(TEXTS) == lone.classify(TEXTS)
    assert first.classify(TEXTS) != second.classify(TEXTS)


def test_a_saved_prompt_answers_the_same_when_loaded(folder, tmp_path):
    prompt = make(folder, metrics={"accuracy": 0.5}, history=[{"epoch": 1}], **CLASSES)
    prompt.save(tmp_path / "prompt")
    again = load(tmp_path / "prompt")
    assert again.generate(TEXTS) == prompt.generate(TEXTS)
    assert again.classify(TEXTS) == prompt.classify(TEXTS)
    assert again.labels == ("good", "bad thing")
    assert (again.metrics, again.history) == ({"accuracy": 0.5}, [{"epoch": 1}])
    with pytest.raises(OutputExistsError):
        prompt.save(tmp_path / "prompt")
    prompt.save(tmp_path / "prompt", overwrite=True)


def test_the_wrong_base_is_refused_unless_asked_for(folders, tmp_path):
    make(folders / "llama").save(tmp_path / "prompt")
    with pytest.raises(FingerprintError, match="was made for"):
        load(tmp_path / "prompt", folders / "other")
    loaded = load(tmp_path / "prompt", folders / "other", ignore_fingerprint=True)
    assert loaded.generate("x")[0].generated_tokens > 0


def test_a_base_in_memory_is_used_as_it_is(llama_folder, tmp_path):
    prompt = make(llama_folder)
    prompt.save(tmp_path / "prompt")
    base = load_base(llama_folder)
    base.model.train()
    loaded = load(tmp_path / "prompt", base.model, tokenizer=base.tokenizer)
    assert loaded.base.model is base.model
    assert not base.model.training
    assert loaded.generate(TEXTS) == prompt.generate(TEXTS)


def test_the_base_comes_back_in_its_recorded_dtype_or_the_one_asked_for(llama_folder, tmp_path):
    make(llama_folder, dtype="bfloat16").save(tmp_path / "prompt")
    assert load(tmp_path / "prompt").base.model.dtype is torch.bfloat16
    loaded = load(tmp_path / "prompt", torch_dtype="float32")
    assert loaded.base.model.dtype is torch.float32


def test_pefts_own_folder_is_a_generator_of_the_bare_input(folder, tmp_path):
    prompt = make(folder)
    prompt.save(tmp_path / "prompt")
    (tmp_path / "prompt" / "softprompt.json").unlink()
    loaded = load(tmp_path / "prompt")
    assert (loaded.manifest.template, loaded.manifest.task, loaded.labels) == (
        "{{input}}",
        "generation",
        None,
    )
    assert loaded.generate(TEXTS) == prompt.generate(TEXTS)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_prompt_that_peft_made_loads_and_answers(folders, tmp_path, name):
    peft = pytest.importorskip("peft")
    base = load_base(folders / name)
    seq2seq = bool(base.model.config.is_encoder_decoder)
    torch.manual_seed(4)
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(base.model, config).eval()
    theirs.save_pretrained(tmp_path / "prompt")
    prompt = load(tmp_path / "prompt")
    source, _ = prompt.rows.source({"input": TEXTS[0]})
    expected = theirs.generate(
        input_ids=torch.tensor([source]),
        attention_mask=torch.ones(1, len(source), dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
    )[0].tolist()
    answer = prompt.generate(TEXTS[0], max_new_tokens=8)[0]
    assert answer.text == prompt.rows.decode(expected[1 if seq2seq else len(source) :])


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_that_names_no_base_asks_for_one(llama_folder, tmp_path):
    make(llama_folder).save(tmp_path / "prompt")
    (tmp_path / "prompt" / "softprompt.json").unlink()
    edit_config(tmp_path / "prompt", base_model_name_or_path=None)
    with pytest.raises(ArtifactError, match="pass base_model"):
        load(tmp_path / "prompt")
    assert load(tmp_path / "prompt", llama_folder).generate("x")


def test_a_prompt_for_a_head_is_sent_elsewhere(llama_folder, tmp_path):
    make(llama_folder).save(tmp_path / "prompt")
    edit_config(tmp_path / "prompt", task_type="SEQ_CLS")
    with pytest.raises(ArtifactError, match=r"got task_type SEQ_CLS; attach it with PeftModel"):
        load(tmp_path / "prompt")


def test_a_base_that_is_gone_is_named(llama_folder, tmp_path):
    make(llama_folder, base_model=str(tmp_path / "gone")).save(tmp_path / "prompt")
    with pytest.raises(BackboneError, match="gone"):
        load(tmp_path / "prompt")


def test_a_prompt_is_detached_and_keeps_its_values(llama_folder):
    tuned = make(llama_folder)
    prompt = tuned.prompt()
    before = prompt.input.clone()
    with torch.no_grad():
        tuned.module.embedding.weight.add_(1)
    assert not prompt.input.requires_grad
    assert torch.equal(prompt.input, before)
    assert torch.equal(tuned.prompt().input, before + 1)
    assert tuned.prompt().key != prompt.key
