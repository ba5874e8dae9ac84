"""Answers of a form: the same on every path, never anything else, and at a bounded cost."""

from __future__ import annotations

import itertools
import json
import re
import time

import jsonschema_rs
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from oracles.served import served
from oracles.slow import only
from oracles.solo import ends_of
from softprompt.engine import generate_with_prompts
from softprompt.errors import ConfigError, ServingError
from softprompt.generation import Batcher, Bounds, Decoder, GenerationOptions, check_form

CHOICES = ("yes", "yes, but", "no", 'a "quoted" one', "tür\n", "\\d")
SCHEMA = {
    "type": "object",
    "properties": {
        "k": {"enum": ["a", "b c"]},
        "t": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "at": {
            "type": "object",
            "properties": {
                "z": {"type": "string", "pattern": "^[0-9]{3}$"},
                "n": {"type": "integer", "maximum": 9},
            },
            "required": ["z"],
            "additionalProperties": False,
        },
        "p": {"type": ["boolean", "null"]},
    },
    "required": ["k", "t", "at", "p"],
    "additionalProperties": False,
}
PATTERN = r"^[0-9]{3}(-[a-f]{1,2}){2}\$$"
FORMS = (
    {"choices": CHOICES},
    {"regex": PATTERN},
    {"json_schema": SCHEMA},
    {"json_schema": '{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}'},
)
SETTINGS = (
    {},
    {"decoding_method": "SAMPLING", "seed": 3},
    {"decoding_method": "SAMPLING", "seed": 5, "temperature": 3.0, "top_p": 0.8, "typical_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "exponential_decay_length_penalty": (1, 3.0)},
)
BASES = ("llama", "bloom", "t5")
IDS = ((1, 40, 41, 42), (1, 99, 100, 101, 102, 103, 104, 105), (1, 50))


@pytest.fixture(scope="module", params=only(["llama", "t5"], BASES))
def base(request):
    if request.param == "llama":
        return served("llama", kinds=("plain", "suffix"), max_position_embeddings=512)
    return served(request.param, kinds=("plain", "other"))


def is_of(form, text):
    if "choices" in form:
        return text in form["choices"]
    if "regex" in form:
        return re.fullmatch(form["regex"], text) is not None
    schema = form["json_schema"]
    return jsonschema_rs.is_valid(json.loads(schema) if isinstance(schema, str) else schema, json.loads(text))


class SlowChoices(LogitsProcessor):
    """Tries every token of the vocabulary: does the text with it begin one of the choices?"""

    def __init__(self, tokenizer, choices, skip, ends):
        self.whole = [choice.encode() for text in choices for choice in (text, f" {text}")]
        self.skip, self.ends = skip, ends
        self.spelt = [self.bytes_of(tokenizer, i) for i in range(len(tokenizer))]

    def bytes_of(self, tokenizer, token):
        if token in tokenizer.all_special_ids:
            return None
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        known = {char: byte for byte, char in bytes_to_unicode().items()}
        return bytes(known[char] for char in tokenizer.convert_ids_to_tokens(token))

    def __call__(self, input_ids, scores):
        so_far = b"".join(self.spelt[token] for token in input_ids[0, self.skip :].tolist())
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for token, spelt in enumerate(self.spelt):
            if token in self.ends:
                allowed[0, token] = so_far in self.whole
            elif spelt is not None:
                allowed[0, token] = any(each.startswith(so_far + spelt) for each in self.whole)
        return scores.masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("ids", [IDS[0], pytest.param(IDS[1], marks=pytest.mark.slow)])
def test_choices_are_those_of_a_search_through_the_vocabulary(base, ids):
    options = GenerationOptions(max_new_tokens=30, choices=CHOICES)
    request = base.request("plain", ids, options=options)
    (found,) = Decoder(base.base).run([request])[0]
    skip = 1 if base.base.is_encoder_decoder else len(ids)
    slow = SlowChoices(base.tokenizer, CHOICES, skip, ends_of(base.base))
    given = torch.tensor([ids])
    kwargs = {"input_ids": given, "attention_mask": torch.ones_like(given), "max_new_tokens": 30}
    kwargs |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": sorted(ends_of(base.base))}
    kwargs["logits_processor"] = LogitsProcessorList([slow])
    rows = generate_with_prompts(base.base, [request.prompt], kwargs)
    assert list(found.tokens) == rows[0, skip:].tolist()
    assert found.text in CHOICES
    assert found.reason == "stop"


@pytest.mark.parametrize(
    ("base", "form"),
    only(
        [("llama", FORMS[1]), ("llama", FORMS[2]), ("t5", FORMS[0]), ("t5", FORMS[3])],
        itertools.product(BASES, FORMS),
    ),
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
    indirect=["base"],
)
def test_every_answer_has_its_form_alone_and_in_a_batch(base, form):
    names = list(base.prompts)
    asked = [
        base.request(name, ids, options=GenerationOptions(max_new_tokens=200, **form, **settings))
        for settings in (SETTINGS[1:3] if form.get("json_schema") is SCHEMA else SETTINGS)
        for name, ids in zip([*names, None] if settings else names, IDS, strict=False)
    ]
    alone = [Decoder(base.base).run([each])[0][0] for each in asked]
    for each in alone:
        assert each.reason == "stop", each
        assert is_of(form, each.text), each.text
    batcher = Batcher(base.base, Bounds(max_batch_rows=8, max_step_tokens=16))
    try:
        tickets = [batcher.submit(each) for each in asked]
        assert [ticket.result(60)[0].tokens for ticket in tickets] == [each.tokens for each in alone]
        pieces = "".join(event.text for event in batcher.submit(asked[0]) if hasattr(event, "logprob"))
        assert pieces == alone[0].text
    finally:
        batcher.stop()


def test_forms_and_free_answers_share_batches(base):
    free = base.request("plain", IDS[0], options=GenerationOptions(max_new_tokens=8))
    held = base.request("plain", IDS[0], options=GenerationOptions(max_new_tokens=8, choices=("yes", "no")), n=2)
    alone = Decoder(base.base).run([free])[0][0]
    together = Decoder(base.base).run([held, free, held])
    assert together[1][0].tokens == alone.tokens
    assert {each.text for answers in (together[0], together[2]) for each in answers} <= {"yes", "no"}


def test_an_answer_that_is_cut_says_so(base):
    options = GenerationOptions(max_new_tokens=4, json_schema=SCHEMA)
    (found,) = Decoder(base.base).run([base.request("plain", IDS[0], options=options)])[0]
    assert found.reason == "length"


def deep(schema, depth):
    for _ in range(depth):
        schema = {"a": schema}
    return schema


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"choices": ("a",), "regex": "b"}, "one form, got choices and regex"),
        ({"regex": "a", "json_schema": "{}"}, "one form, got regex and json_schema"),
        ({"choices": ("a", "")}, "choices expects texts of one or more"),
        ({"choices": ("a", "\ud83d")}, "choices expects texts of one or more whole characters"),
        ({"regex": ""}, "regex expects texts"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": "[1]"}, "json_schema expects an object"),
        ({"json_schema": '{"a":' * 257 + "1" + "}" * 257}, "json_schema is not JSON .*nested more than 256 deep"),
        ({"json_schema": '{"a":' * 9000 + "1" + "}" * 9000}, "json_schema is not JSON .*recursion"),
        ({"json_schema": deep({}, 5000)}, "json_schema is not JSON .*recursion"),
        ({"json_schema": {"a": object()}}, "json_schema is not JSON .*object"),
        ({"regex": "a" * 70_000}, "regex expects at most 65,536 characters"),
        ({"choices": ("a" * 40_000, "b" * 40_000)}, "choices expects at most 65,536 characters"),
        ({"regex": "a", "min_new_tokens": 2}, "leave min_new_tokens out"),
        ({"regex": "a", "num_beams": 2}, "leave num_beams out"),
    ],
)
def test_options_that_contradict_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        GenerationOptions(**settings)


def nested(depth):
    schema = {"type": "string"}
    for i in range(depth):
        schema = {"type": "object", "properties": {f"a{i}": schema}, "required": [f"a{i}"]}
    return schema


WIDE = {
    "type": "object",
    "properties": {f"p{i}": {"type": "integer"} for i in range(800)},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a)|(b"}, "unopened group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"$ref": "https://example.org/schema.json"}}, "does not fetch"),
        ({"json_schema": "false"}, "schema is false"),
        ({"json_schema": {"type": "integer", "multipleOf": 1234567, "minimum": 10**15}}, "fuel"),
    ],
)
def test_forms_that_no_answer_can_be_held_to_are_refused_before_they_run(base, form, told):
    began = time.monotonic()
    options = GenerationOptions(**form)
    with pytest.raises(ConfigError, match=f"(?s)no answer can be held to this form.*{told}"):
        check_form(base.base, options)
    batcher = Batcher(base.base)
    with pytest.raises(ConfigError, match="held to this form"):
        batcher.submit(base.request("plain", IDS[0], options=options))
    batcher.stop()
    assert time.monotonic() - began < 5


def test_forms_that_are_no_longer_kept_are_made_again(base, monkeypatch):
    monkeypatch.setattr("softprompt.generation.forms._KEPT", 1)
    decoder = Decoder(base.base)
    requests = [
        base.request("plain", IDS[0], options=GenerationOptions(max_new_tokens=9, choices=choice))
        for choice in (("good", "bad"), ("late", "early")) * 2
    ]
    found = [answer.text for (answer,) in (decoder.run([each])[0] for each in requests)]
    assert found[:2] == found[2:]
    assert found[0] in ("good", "bad")
    assert found[1] in ("late", "early")


def test_a_form_beyond_the_limits_fails_alone(base):
    """A schema that compiles and whose second token already has too many ways to go on."""
    wide = base.request("plain", IDS[0], options=GenerationOptions(max_new_tokens=9, json_schema=WIDE))
    good = base.request("plain", IDS[1], options=GenerationOptions(max_new_tokens=9))
    batcher = Batcher(base.base)
    try:
        began = time.monotonic()
        both = [batcher.submit(wide), batcher.submit(good)]
        with pytest.raises(ServingError, match="too complex"):
            both[0].result(30)
        assert both[1].result(30)[0].tokens == Decoder(base.base).run([good])[0][0].tokens
        assert batcher.healthy
        assert time.monotonic() - began < 10
    finally:
        batcher.stop()


def test_hostile_forms_cost_little(base):
    hostile = [
        {"regex": "((a{1,30}){1,30}){1,30}"},
        {"regex": "(a|b|ab|ba)*c.{20}(x|y).{20}[a-z]{1000}"},
        {"regex": "[ab]*a[ab]{18}c"},
        {"json_schema": nested(60)},
        {"json_schema": {"type": "string", "maxLength": 10**6}},
        {"json_schema": {"enum": [f"value number {i}" for i in range(2000)]}},
    ]
    began = time.monotonic()
    for form in hostile:
        options = GenerationOptions(max_new_tokens=12, **form)
        Decoder(base.base).run([base.request("plain", IDS[0], options=options)])
    assert time.monotonic() - began < 10


def test_a_tokenizer_without_an_end_cannot_say_when_an_answer_is_whole(base, monkeypatch):
    from softprompt.generation.forms import Forms

    with pytest.raises(ConfigError, match="an end token"):
        Forms(base.tokenizer, ())
    with pytest.raises(ConfigError, match="does not read this base's tokenizer"):
        Forms(object(), (2,))


def test_the_extra_is_named_where_it_is_missing(base, monkeypatch):
    import sys

    from softprompt.generation.forms import Forms

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r'pip install "softprompt\[structured\]"'):
        Forms(base.tokenizer, (2,))
