"""What PEFT does right is matched to 1e-5: logits, loss, gradients, steps, tokens, files."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

import softprompt
from oracles.families import CAUSAL, build, causal
from oracles.peft_pair import TASKS, base, batch, pair
from oracles.slow import only

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore")


def first_output(task, output):
    names = {"QUESTION_ANS": "start_logits", "FEATURE_EXTRACTION": "last_hidden_state"}
    return getattr(output, names.get(task, "logits"))


def read(task, output, inputs):
    """Return what is read of a first output: encoders run without padding, so not their padding."""
    values = first_output(task, output)
    if task not in ("TOKEN_CLS", "FEATURE_EXTRACTION"):
        return values
    mask = inputs["attention_mask"].bool()
    prompt = mask.new_ones(mask.shape[0], values.shape[1] - mask.shape[1])
    return values[torch.cat([prompt, mask], dim=1)]


def weight(model):
    return model.prompt_encoder["default"].embedding.weight


@pytest.mark.parametrize("task", TASKS)
def test_outputs_loss_and_gradient(task):
    ours, theirs = pair(task)
    inputs = batch(task)
    a, b = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(read(task, a, inputs), read(task, b, inputs), **TOLERANCE)
    if task == "QUESTION_ANS":
        torch.testing.assert_close(a.end_logits, b.end_logits, **TOLERANCE)
    loss_a = a.loss if "labels" in inputs else read(task, a, inputs).square().mean()
    loss_b = b.loss if "labels" in inputs else read(task, b, inputs).square().mean()
    torch.testing.assert_close(loss_a, loss_b, **TOLERANCE)
    loss_a.backward()
    loss_b.backward()
    torch.testing.assert_close(weight(ours).grad, weight(theirs).grad, **TOLERANCE)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_training_steps(task):
    ours, theirs = pair(task)
    inputs = batch(task)
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    torch.testing.assert_close(weight(ours), weight(theirs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, **TOLERANCE)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 5},
    ],
    ids=["greedy", "beam", "two-beams", "processors", "sample"],
)
def test_generated_tokens(task, options):
    ours, theirs = pair(task)
    inputs = batch(task, padded=False)
    inputs.pop("labels")
    torch.manual_seed(5)
    a = ours.generate(**inputs, max_new_tokens=7, **options)
    torch.manual_seed(5)
    b = theirs.generate(**inputs, max_new_tokens=7, **options)
    assert a.tolist() == b.tolist()


@pytest.mark.parametrize("name", only(["gpt2", "llama", "gemma3", "bloom"], sorted(set(CAUSAL) - {"opt", "mpt"})))
def test_every_architecture_without_padding(name):
    ours, theirs = pair("CAUSAL_LM", causal(name))
    inputs = batch("CAUSAL_LM", padded=False)
    a, b = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(a.logits, b.logits, **TOLERANCE)
    torch.testing.assert_close(a.loss, b.loss, **TOLERANCE)


@pytest.mark.parametrize("task", TASKS)
def test_our_folder_loads_in_peft(task, tmp_path):
    ours, _ = pair(task)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.PromptTuningConfig)
    theirs = peft.PeftModel.from_pretrained(base(task), tmp_path).eval()
    inputs = batch(task, padded=False)
    torch.testing.assert_close(
        first_output(task, ours(**inputs)), first_output(task, theirs(**inputs)), **TOLERANCE
    )


@pytest.mark.parametrize("task", TASKS)
def test_pefts_folder_loads_here(task, tmp_path):
    _, theirs = pair(task)
    theirs.save_pretrained(tmp_path)
    ours = softprompt.PeftModel.from_pretrained(base(task), tmp_path)
    inputs = batch(task, padded=False)
    torch.testing.assert_close(
        first_output(task, ours.eval()(**inputs)), first_output(task, theirs(**inputs)), **TOLERANCE
    )


def test_pefts_seq2seq_folder_with_twice_the_rows(tmp_path):
    """PEFT's default for seq2seq saves 2 P rows and reads P of them."""
    model = base("SEQ_2_SEQ_LM")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = softprompt.PeftModel.from_pretrained(base("SEQ_2_SEQ_LM"), tmp_path).eval()
    assert ours.get_prompt_embedding_to_save("default").shape[0] == 4
    inputs = batch("SEQ_2_SEQ_LM")
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, **TOLERANCE)


def test_bfloat16_base_with_float32_prompt():
    model = causal("llama").to(torch.bfloat16)
    ours, theirs = pair("CAUSAL_LM", model)
    assert weight(ours).dtype is torch.float32
    inputs = batch("CAUSAL_LM", padded=False)
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB", "RANDOM"])
def test_initial_rows(init, tmp_path):
    from oracles.tokenizers import byte_bpe

    byte_bpe(bos=True).save_pretrained(tmp_path)
    extra = {}
    if init == "TEXT":
        extra = {
            "prompt_tuning_init_text": "is it good or bad",
            "tokenizer_name_or_path": str(tmp_path),
        }
    for length in (3, 40):
        rows = []
        for library in (softprompt, peft):
            config = library.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=length, prompt_tuning_init=init, **extra
            )
            model = build(__import__("transformers").AutoModelForCausalLM, CAUSAL["llama"](), vocab_size=400)
            torch.manual_seed(11)
            rows.append(weight(library.get_peft_model(model, config)).detach())
        assert torch.equal(*rows)


def test_gradient_checkpointing():
    ours, _ = pair("CAUSAL_LM")
    inputs = batch("CAUSAL_LM")
    ours(**inputs).loss.backward()
    expected = weight(ours).grad.clone()
    weight(ours).grad = None
    for reentrant in (True, False):
        ours.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.train()
        ours(**inputs, use_cache=False).loss.backward()
        torch.testing.assert_close(weight(ours).grad, expected, **TOLERANCE)
        weight(ours).grad = None
