"""A placement is trained, recorded, saved, loaded, scored and generated with, row by row as in a batch."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import softprompt
from oracles.slow import only
from softprompt.backbone import input_embedding, load_base

CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[answer]\n{% endif %}"
)
TEXTS = ["The kettle broke after one day.", "Hello"]


@pytest.mark.parametrize("placement", only(["suffix"], ["after_bos", "suffix", "chat_system"]))
def test_from_tune_to_answers(placement, tmp_path):
    base = load_base("demo")
    if placement == "chat_system":
        base.tokenizer.chat_template = CHAT
    if placement == "after_bos":
        base.tokenizer.bos_token, base.model.config.bos_token_id = "</s>", 0
        start = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
        base.tokenizer.backend_tokenizer.post_processor = start
    data = [{"input": f"item {i} is {word}", "output": word} for i in range(4) for word in ("good", "bad")]
    tuned = softprompt.tune(
        base, data, output=tmp_path / "prompt", num_epochs=1, batch_size=4,
        tuning_config={"num_virtual_tokens": 3, "placement": placement},
        task="classification", silence_progress_bars=True,
    )  # fmt: skip
    again = softprompt.load(tmp_path / "prompt", base_model=tuned.base.model, tokenizer=base.tokenizer)
    assert again.config.placement == placement
    scores = again.classify(TEXTS)
    assert [s.scores for s in scores] == [s.scores for s in tuned.classify(TEXTS)]
    rows = again.module.materialize().detach()
    model = again.base.model
    table = input_embedding(model)
    for text, found in zip(TEXTS, scores, strict=True):
        source, _ = again.rows.source({"input": text})
        at = again.rows.offset(source)
        assert at > 0
        ids = torch.tensor(source)
        for label in ("good", "bad"):
            target = torch.tensor(again.rows.label(label))
            whole = torch.cat([table(ids[:at]), rows, table(ids[at:]), table(target)])
            with torch.no_grad():
                logits = model(inputs_embeds=whole[None]).logits[0]
            log_probs = logits[-len(target) - 1 : -1].log_softmax(-1)
            expected = log_probs[torch.arange(len(target)), target].sum()
            assert found.scores[label] == pytest.approx(float(expected), abs=1e-4)
    both = again.generate(TEXTS, max_new_tokens=4)
    alone = [again.generate(text, max_new_tokens=4)[0] for text in TEXTS]
    assert [each.text for each in both] == [each.text for each in alone]
    report = softprompt.evaluate(again, data)
    assert report.accuracy is not None
