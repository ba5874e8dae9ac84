"""Models with a state instead of a cache generate behind prompts at every place."""

import pytest
import torch
import transformers as tf

from oracles import families
from oracles.naive import with_prompt
from softprompt import PromptTuningConfig, get_peft_model

IDS = (5, 9, 13, 22, 7)


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_mamba(placement):
    config = tf.MambaConfig(
        vocab_size=families.V,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        tie_word_embeddings=False,
        **families.IDS,
    )
    model = families.build(tf.AutoModelForCausalLM, config)
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, placement=placement)
    prompted = get_peft_model(model, options)
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        prompted.encoder_of("default").embedding.weight.copy_(rows)
    ids = torch.tensor([IDS])
    at = len(IDS) if placement == "suffix" else 0
    expected = list(IDS)
    table = model.get_input_embeddings()
    with torch.no_grad():
        for _ in range(6):
            model_in = with_prompt(table, tuple(expected), at, rows)
            expected.append(int(model(inputs_embeds=model_in).logits[0, -1].argmax()))
        mask = torch.ones_like(ids)
        found = prompted.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert found[0].tolist() == expected
    assert len(set(expected[len(IDS) :])) > 1
