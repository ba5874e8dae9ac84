"""Libraries that run a prompted model as any other: pipelines, sentence-transformers, lm-evaluation-harness."""

from __future__ import annotations

import json
import runpy
import sys

import peft
import pytest
import torch
import transformers as tf

import softprompt
from oracles.families import ENCODERS, build
from oracles.tokenizers import byte_bpe
from softprompt import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model
from softprompt.bundled import model_directory
from softprompt.inference import convert

P = 4
TEXTS = ["The kettle broke", "What time do you open on Sunday, and"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer():
    return tf.AutoTokenizer.from_pretrained(model_directory())


@pytest.fixture(scope="module")
def writer():
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_pretrained(model_directory())
    return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()


def alone(model, tokenizer, text, count=5):
    """Return what greedy ``generate`` writes behind one text."""
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0]
    return tokenizer.decode(ids[inputs.input_ids.shape[1] :])


def written(pipe, texts, **options):
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False, **options}
    return [each[0]["generated_text"] for each in pipe(texts, **options)]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_text_pipeline_over_the_model_in_memory(writer, tokenizer, batch):
    pipe = tf.pipeline("text-generation", model=writer, tokenizer=tokenizer)
    expected = [alone(writer, tokenizer, text) for text in TEXTS]
    with writer.disable_adapter():
        assert [alone(writer, tokenizer, text) for text in TEXTS] != expected
    assert written(pipe, TEXTS, batch_size=batch) == expected


def test_a_text_pipeline_from_a_folder(writer, tokenizer, tmp_path):
    """Of the prompt by our Auto class; of the export, which is a model folder, by the name alone."""
    expected = [alone(writer, tokenizer, text) for text in TEXTS]
    writer.save_pretrained(tmp_path / "prompt")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "prompt")
    assert written(tf.pipeline("text-generation", model=loaded, tokenizer=tokenizer), TEXTS) == expected
    with pytest.raises(ValueError, match="does not support prompt learning"):  # PEFT's word, of its own too
        tf.pipeline("text-generation", model=str(tmp_path / "prompt"))
    convert(tmp_path / "prompt", tmp_path / "wide", to="extended-vocab")
    text = json.loads((tmp_path / "wide" / "softprompt_prompts.json").read_text())["prompts"]["prompt"]["text"]
    pipe = tf.pipeline("text-generation", model=str(tmp_path / "wide"))
    found = written(pipe, [text["before"] + each + text["after"] for each in TEXTS])
    assert found == expected


def test_pipelines_of_other_tasks():
    tokenizer = byte_bpe()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = ENCODERS["bert"]()
    config.vocab_size = len(tokenizer)
    texts = ["a kettle", "a much longer text about it"]
    classifier = get_peft_model(
        build(tf.AutoModelForSequenceClassification, config, num_labels=2),
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P),
    ).eval()
    found = tf.pipeline("text-classification", model=classifier, tokenizer=tokenizer)(texts, batch_size=2)
    for text, each in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        scores = classifier(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits.softmax(-1)[0]
        assert each["label"] == f"LABEL_{int(scores.argmax())}"
        assert each["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    reader = get_peft_model(
        build(tf.AutoModel, config), PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    ).eval()
    features = tf.pipeline("feature-extraction", model=reader, tokenizer=tokenizer)(texts[0])
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    expected = reader(input_ids=ids).last_hidden_state
    assert expected.shape[1] == P + ids.shape[1]
    torch.testing.assert_close(torch.tensor(features), expected, atol=1e-5, rtol=0)


def test_sentences_are_encoded_as_with_peft(tmp_path):
    """One vector a text, whichever texts share its batch."""
    library = pytest.importorskip(
        "sentence_transformers", reason="needs sentence-transformers: run make test-extra"
    )
    from sentence_transformers.models import Pooling, Transformer

    tokenizer = byte_bpe()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = ENCODERS["bert"]()
    config.vocab_size = len(tokenizer)
    build(tf.AutoModel, config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a kettle", "a much longer text about it", "open"]
    found = {}
    for prompts in (softprompt, peft):
        sentences = library.SentenceTransformer(
            modules=[Transformer(str(tmp_path)), Pooling(config.hidden_size, "cls")], device="cpu"
        )
        torch.manual_seed(0)
        asked = prompts.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
        sentences[0].auto_model = prompts.get_peft_model(sentences[0].auto_model, asked).eval()
        found[prompts] = sentences.encode(texts, convert_to_tensor=True)
    ours, theirs = found[softprompt], found[peft]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(sentences.encode(texts[:1], convert_to_tensor=True), theirs[:1], atol=1e-5, rtol=0)


def test_the_harness_scores_and_writes_behind_the_prompt(writer, tokenizer):
    """Its log-probabilities are those of plain passes over the same model."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: run make test-extra")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("The kettle broke", " after one day."), ("Open on", " Sunday"), ("a", " much longer answer than it")]
    harness = HFLM(pretrained=writer, tokenizer=tokenizer, batch_size=3, device="cpu", max_length=64)
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, answer), (score, greedy) in zip(pairs, harness.loglikelihood(asked), strict=True):
        before, after = harness._encode_pair(context, answer)
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logits = writer(input_ids=ids).logits[0, P:]
        start = len(before) - 1
        rows = logits[start : start + len(after)].log_softmax(-1)
        picked = rows.gather(1, torch.tensor(after)[:, None])
        assert score == pytest.approx(picked.sum().item(), abs=1e-4)
        assert greedy == bool((rows.argmax(-1) == torch.tensor(after)).all())
    until = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, until), i) for i, text in enumerate(TEXTS)]
    assert harness.generate_until(asked) == [alone(writer, tokenizer, text) for text in TEXTS]


def test_the_harness_command_without_the_harness_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("softprompt.lm_eval", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "Error: softprompt.lm_eval needs lm-evaluation-harness: pip install lm_eval\n"
    )
