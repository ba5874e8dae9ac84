"""A real language model of 135 million parameters, from training to an exported checkpoint."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import softprompt
from oracles.real_model import smollm2
from softprompt.backbone import Base
from softprompt.engine import EngineRow, build_engine, choose_engine, why_undecodable
from softprompt.inference import convert

RECORDS = [
    {"input": "my parcel is lost again", "output": "complaint"},
    {"input": "what a lovely day", "output": "no complaint"},
    {"input": "the screen broke after a week", "output": "complaint"},
    {"input": "thank you, great service", "output": "no complaint"},
]
QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def base():
    folder = smollm2()
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    return Base(model, tf.AutoTokenizer.from_pretrained(folder), str(folder))


@pytest.fixture(scope="module")
def prompts(base, tmp_path_factory):
    """Two prompts, trained for three updates and for one, and their folders."""
    found = {}
    for seed, epochs in ((1, 3), (2, 1)):
        folder = tmp_path_factory.mktemp("prompts") / f"seed{seed}"
        tuned = softprompt.tune(
            base,
            RECORDS,
            num_epochs=epochs,
            batch_size=4,
            learning_rate=0.01,
            seed=seed,
            verbalizer="{{input}}\nComplaint or not:",
            tuning_config={
                "num_virtual_tokens": 6,
                "prompt_tuning_init_method": "TEXT",
                "prompt_tuning_init_text": "Is this a complaint?",
            },
            output=folder,
            silence_progress_bars=True,
        )
        found[folder.name] = tuned, folder
    return found


def test_every_fast_path_is_taken(base):
    assert (choose_engine(base).name, choose_engine(base).reason) == ("forest", "")
    assert why_undecodable(base) == ""


@pytest.mark.slow
def test_training_lowers_the_loss_and_a_loaded_prompt_scores_alike(base, prompts):
    tuned, folder = prompts["seed1"]
    losses = [point["loss"] for point in tuned.history]
    assert losses[-1] < losses[0]
    loaded = softprompt.load(folder, base.model, tokenizer=base.tokenizer)
    texts = [record["input"] for record in RECORDS]
    scored, again = tuned.classify(texts), loaded.classify(texts)
    assert [each.scores for each in scored] == [each.scores for each in again]
    for text, own in zip(texts, scored, strict=True):
        [alone] = tuned.classify([text])
        assert alone.label == own.label
        for label, score in alone.scores.items():
            assert score == pytest.approx(own.scores[label], rel=1e-4)


@pytest.mark.slow
def test_mixed_prompts_are_served_as_each_alone(prompts):
    served = {name: tuned for name, (tuned, _) in prompts.items()}
    names = ["seed1", "seed2", "seed1"]
    texts = [QUESTION, "my phone is dead", "it is fine"]
    with softprompt.Serving(served) as serving:
        together = serving.generate(texts, names, max_new_tokens=6)
    for name, text, answer in zip(names, texts, together, strict=True):
        tuned = served[name]
        [alone] = tuned.generate(text, max_new_tokens=6)
        assert answer.text == alone.text


@pytest.mark.slow
def test_the_exported_checkpoint_answers_as_the_prompt(prompts, tmp_path):
    tuned, folder = prompts["seed1"]
    convert(folder, tmp_path / "out", to="extended-vocab")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = tuned.base.tokenizer("it is late\nComplaint or not:").input_ids
    prompt = tuned.module.prompt().detach().input
    own = tuned.base.model
    with torch.no_grad():
        embeds = torch.cat([prompt, own.get_input_embeddings()(torch.tensor(tokens))])
        expected = own(inputs_embeds=embeds[None]).logits[0, len(prompt) :]
        size = own.get_input_embeddings().weight.shape[0]
        ids = torch.tensor([*range(size, size + len(prompt)), *tokens])
        got = model(input_ids=ids[None]).logits[0, len(prompt) :, :size]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_engines_agree_on_losses_and_gradients(base, prompts):
    tuned, _ = prompts["seed2"]
    tokens = [base.tokenizer(f"{r['input']} {r['output']}").input_ids for r in RECORDS]
    found = {}
    for kind in ("plain", "forest"):
        prompt = tuned.module.prompt().leaves()
        rows = [EngineRow(tuple(ids[:-2]), tuple(ids[-2:]), prompt) for ids in tokens]
        score = build_engine(base, kind).target_log_probs(rows).values.sum()
        score.backward()
        found[kind] = score.item(), prompt.input.grad
    assert found["plain"][0] == pytest.approx(found["forest"][0], rel=1e-5)
    off = (found["plain"][1] - found["forest"][1]).norm() / found["plain"][1].norm()
    assert off < 1e-3
