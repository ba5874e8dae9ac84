"""Sequence classification on all-MiniLM-L6-v2: prompt and head learn, the encoder does not."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import softprompt

TEXTS = [
    ("a warm and funny film", 1),
    ("a dull, lifeless mess", 0),
    ("one of the best of the year", 1),
    ("an utter waste of two hours of anybody 's time", 0),
    ("the cast is wonderful", 1),
    ("painfully bad dialogue", 0),
    ("moving from the first scene to the last", 1),
    ("i nearly walked out", 0),
]


@pytest.fixture
def encoder(minilm):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2).eval()


@pytest.fixture
def batch(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts, labels = zip(*TEXTS, strict=True)
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    return dict(inputs), torch.tensor(labels)


def _prompted(encoder):
    config = softprompt.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB"
    )
    return softprompt.get_peft_model(encoder, config).eval()


def test_prompt_and_head_learn_and_come_back(minilm, encoder, batch, tmp_path):
    inputs, labels = batch
    frozen = {name: p.clone() for name, p in encoder.named_parameters() if "bert." in name}
    model = _prompted(encoder)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("prompt_encoder" in name or "classifier" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.get_base_model().named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])

    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.argmax(dim=1).equal(labels)
    model.save_pretrained(tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2).eval()
    loaded = softprompt.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, logits)


def test_padding_does_not_matter(encoder, batch):
    inputs, _ = batch
    model = _prompted(encoder)
    with torch.no_grad():
        together = model(**inputs).logits
        for i in range(len(TEXTS)):
            length = int(inputs["attention_mask"][i].sum())
            alone = model(**{name: value[i : i + 1, :length] for name, value in inputs.items()})
            torch.testing.assert_close(alone.logits[0], together[i], atol=1e-5, rtol=1e-5)
