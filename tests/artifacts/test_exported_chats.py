"""Prompts of chats in an export: messages with their tokens, as plain transformers puts them, against ours."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoTokenizer

import softprompt
from oracles.payloads import read_payload
from oracles.slow import only
from oracles.tiny_bases import LOADERS, VOCABULARY, P, write_base, write_prompt
from oracles.tokenizers import CHATML, chat_bpe
from softprompt.artifacts import load_adapter, save_adapter
from softprompt.errors import ArtifactError
from softprompt.inference import convert

IN_SYSTEM = {"peft_type": "EXTENDED_PROMPT_TUNING", "placement": "chat_system"}
TEXTS = ["it broke again", " thank  you, great service", "é 7"]
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
TALK = [
    {"role": "user", "content": "the parcel is late"},
    {"role": "assistant", "content": "which one?"},
    {"role": "user", "content": "again"},
]


def base_of(path, template=CHATML):
    write_base(path, "llama", max_position_embeddings=256)
    chat_bpe(template).save_pretrained(path)
    return str(path)


def prompt_of(path, base, *, chat=False, template="{{input}}", **config):
    """Save a prompt of a base; ``chat`` says that it was trained on chats."""
    stored = load_adapter(write_prompt(path.with_name(f"{path.name}-made"), base, **config))
    manifest = dataclasses.replace(stored.manifest, chat=chat, template=template, max_source_length=256)
    save_adapter(path, stored.config, stored.tensors, manifest, overwrite=False)
    return path


def exported(source, to, **options):
    """Return what is written of an export, and it as plain transformers loads it."""
    convert(source, to, to="extended-vocab", **options)
    record = json.loads((to / "softprompt_prompts.json").read_text())["prompts"]
    return record, LOADERS["CAUSAL_LM"].from_pretrained(to).eval(), AutoTokenizer.from_pretrained(to)


def ids_of(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def filled(messages, text):
    return [{**each, "content": each["content"].replace("{{input}}", text)} for each in messages]


def greedy(model, ids):
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    return model.generate(given, attention_mask=mask, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()


@torch.no_grad()
def own_logits(tuned, request):
    """Return softprompt's input of a request through its base: the prompt's values among the ids' embeddings."""
    ids, _ = tuned.rows.source(request)
    at, table = tuned.rows.offset(ids), tuned.base.model.get_input_embeddings()
    parts = [table(torch.tensor(ids[:at]).long()), tuned.prompt().input, table(torch.tensor(ids[at:]).long())]
    return tuned.base.model(inputs_embeds=torch.cat(parts)[None]).logits[0]


def check_same(tuned, model, tokenizer, request, messages):
    ids = ids_of(tokenizer, messages)
    expected = own_logits(tuned, request)
    with torch.no_grad():
        came = model(torch.tensor([ids])).logits[0, :, :VOCABULARY]
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-5)
    (own,) = tuned.generate([request], max_new_tokens=12)
    assert tuned.rows.decode(greedy(model, ids)) == own.text


@pytest.mark.parametrize("template", only([TRIMMING], [CHATML, TRIMMING]), ids=["chatml", "trimming"])
@pytest.mark.parametrize(
    ("chat", "own"),
    [
        (True, "{{input}}"),
        pytest.param(False, "{{input}}", marks=pytest.mark.slow),
        (False, "Text : {{input}} Label : "),
    ],
)
def test_a_system_message_of_the_prompts_tokens_gives_the_prompts_answers(tmp_path, template, chat, own):
    base = base_of(tmp_path / "base", template)
    source = prompt_of(tmp_path / "x", base, chat=chat, template=own, **IN_SYSTEM)
    record, model, tokenizer = exported(source, tmp_path / "out")
    entry, tuned = record["x"], softprompt.load(source)
    assert (entry["placement"], entry["text"]) == ("chat_system", None)
    assert entry["messages"] == [
        {"role": "system", "content": "".join(f"<sp:x:{i}>" for i in range(P))},
        {"role": "user", "content": own},
    ]
    for text in TEXTS:
        request = {"messages": [{"role": "user", "content": text}]} if chat else {"input": text}
        check_same(tuned, model, tokenizer, request, filled(entry["messages"], text))


def test_a_chat_with_a_system_text_of_its_own_and_several_turns(tmp_path):
    source = prompt_of(tmp_path / "x", base_of(tmp_path / "base"), chat=True, **IN_SYSTEM)
    record, model, tokenizer = exported(source, tmp_path / "out")
    own = {"role": "system", "content": "Be brief."}
    with_prompt = {"role": "system", "content": record["x"]["tokens"] + "Be brief."}
    check_same(softprompt.load(source), model, tokenizer, {"messages": [own, *TALK]}, [with_prompt, *TALK])


def test_a_prompt_in_front_of_a_chat_stands_before_the_ids_of_its_messages(tmp_path):
    source = prompt_of(tmp_path / "x", base_of(tmp_path / "base"), chat=True)
    record, model, tokenizer = exported(source, tmp_path / "out")
    entry, tuned = record["x"], softprompt.load(source)
    assert (entry["placement"], entry["text"]) == ("prefix", None)
    for text in TEXTS:
        ids = entry["token_ids"] + ids_of(tokenizer, filled(entry["messages"], text))
        (own,) = tuned.generate([text], max_new_tokens=12)
        assert tuned.rows.decode(greedy(model, ids)) == own.text


def test_each_prompt_of_an_export_has_its_own_placement(tmp_path):
    base = base_of(tmp_path / "base")
    source = prompt_of(tmp_path / "x", base, chat=True, **IN_SYSTEM)
    more = prompt_of(tmp_path / "y", base, template="Text : {{input}}", seed=5)
    record, model, tokenizer = exported(source, tmp_path / "out", add={"y": more})
    assert [record[name]["placement"] for name in "xy"] == ["chat_system", "prefix"]
    assert record["y"]["messages"] is None and record["y"]["text"] is not None
    request = {"messages": TALK}
    told = [record["x"]["messages"][0], *TALK]
    check_same(softprompt.load(source), model, tokenizer, request, told)


CHANGES = ["| upper", "| replace('<sp:x:0>', '')", "| replace('>', '> ')", "| replace('Be brief.', 'Be short.')"]


@pytest.mark.parametrize("change", only([CHANGES[0], CHANGES[3]], CHANGES))
def test_a_template_that_alters_the_system_message_is_refused(tmp_path, change):
    """Letters of the tokens, a token, what stands between them, and text behind them where they are there."""
    altered = CHATML.replace("m['content']", f"(m['content'] {change} if m['role'] == 'system' else m['content'])")
    if "Be brief." in change:
        altered = altered.replace("if m['role']", "if '<sp:' in m['content'] and m['role']")
    base = base_of(tmp_path / "base", altered)
    source = prompt_of(tmp_path / "x", base, chat=True, **IN_SYSTEM)
    with pytest.raises(ArtifactError, match=r"in a system message where .* train with --placement prefix"):
        convert(source, tmp_path / "out", to="extended-vocab")
    assert not (tmp_path / "out").exists()


def test_a_prompt_in_front_goes_with_such_a_template(tmp_path):
    """A prompt in front is put by its ids, whatever the template does with a system message."""
    altered = CHATML.replace("m['content']", "m['content'] | replace('<sp:x:0>', '')")
    source = prompt_of(tmp_path / "x", base_of(tmp_path / "base", altered), chat=True)
    record, _, _ = exported(source, tmp_path / "out")
    assert record["x"]["messages"] == [{"role": "user", "content": "{{input}}"}]


@pytest.mark.parametrize("placement", ["chat_system", "suffix"])
@torch.no_grad()
def test_a_request_to_vllm_has_the_prompt_in_its_place(tmp_path, placement):
    config = IN_SYSTEM | {"placement": placement}
    source = prompt_of(tmp_path / "x", base_of(tmp_path / "base"), chat=True, **config)
    convert(source, tmp_path / "r.json", to="vllm", text={"messages": TALK})
    payload, tuned = read_payload(tmp_path / "r.json"), softprompt.load(source)
    came = tuned.base.model(inputs_embeds=payload[None]).logits[0]
    torch.testing.assert_close(came, own_logits(tuned, {"messages": TALK}), rtol=0, atol=1e-6)
    virtual = load_adapter(source).values
    head = len(chat_bpe()("<|im_start|>system\n")["input_ids"])
    at = head if placement == "chat_system" else len(payload) - P
    assert torch.equal(payload[at : at + P], virtual)


@pytest.mark.parametrize(
    ("to", "end"),
    only(
        [("caikit", ""), ("npy", ".npy")],
        [("caikit", ""), ("tgis", ""), ("npy", ".npy"), ("tensor", ".safetensors")],
    ),
)
def test_bare_tensors_refuse_and_say_how_to_train(tmp_path, to, end):
    source = prompt_of(tmp_path / "x", base_of(tmp_path / "base"), **IN_SYSTEM)
    with pytest.raises(ArtifactError, match=r"stands elsewhere \(chat_system\); train with placement prefix"):
        convert(source, tmp_path / f"out{end}", to=to)


def test_an_export_refuses_a_prompt_behind_the_input(tmp_path):
    config = IN_SYSTEM | {"placement": "suffix"}
    source = prompt_of(tmp_path / "x", base_of(tmp_path / "base"), **config)
    with pytest.raises(ArtifactError, match=r"before the input or into a chat's system turn, .*\(suffix\)"):
        convert(source, tmp_path / "out", to="extended-vocab")
