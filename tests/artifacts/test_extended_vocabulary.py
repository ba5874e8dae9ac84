"""The base saved with prompts as vocabulary, loaded with plain transformers."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import transformers as tf

import softprompt
from oracles import families
from oracles.slow import only
from oracles.tiny_bases import LOADERS, VOCABULARY, P, write_base, write_prompt
from oracles.tokenizers import byte_bpe
from softprompt.artifacts import load_adapter, save_adapter
from softprompt.artifacts.formats import extended_model
from softprompt.artifacts.formats.extended_vocabulary import add_prompt_tokens
from softprompt.errors import ArtifactError, ConfigError, OutputExistsError
from softprompt.inference import convert

TEXTS = ["it broke again", " thank  you, great service", "é 7"]
HEADS = dict.fromkeys(families.CAUSAL, "least likely row") | {
    "phi": "bias",
    "gptj": "bias",
    "t5": "tied",
    "bart": "bias",
}


def exported(tmp_path, name="llama", *, base=None, names=("x",), **options):
    """Write base, prompt and export; return the export loaded by plain transformers."""
    base = base or write_base(tmp_path / "base", name)
    for number, each in enumerate(names):
        write_prompt(tmp_path / each, base, seed=number)
    add = {each: tmp_path / each for each in names[1:]}
    done = convert(tmp_path / names[0], tmp_path / "out", to="extended-vocab", add=add, **options)
    return done.facts, *plain(tmp_path / "out")


def plain(path):
    config = tf.AutoConfig.from_pretrained(path)
    loader = LOADERS["SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"]
    return loader.from_pretrained(path).eval(), tf.AutoTokenizer.from_pretrained(path)


def text_of(entry, text):
    """Render a text as the export says, the way any engine would be given it."""
    rendered = entry["template"].replace("{{input}}", text)
    form = entry["text"]
    return form["before"] + rendered + form["after"], form["add_special_tokens"]


def answers(model, tokenizer, entry, *, new=12):
    """Return greedy answers of the export to plain text, without softprompt."""
    found = []
    for each in TEXTS:
        text, special = text_of(entry, each)
        ids = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)[0]
        found.append(out if model.config.is_encoder_decoder else out[ids.shape[1] :])
    return found


@pytest.mark.parametrize("name", only(["llama", "gptj", "t5"], HEADS))
def test_plain_transformers_gives_the_same_greedy_text(tmp_path, name):
    facts, model, tokenizer = exported(tmp_path, name)
    assert facts["head"] == HEADS[name]
    assert facts["vocabulary"] == VOCABULARY + P
    assert facts["prompts"]["x"]["token_ids"] == list(range(VOCABULARY, VOCABULARY + P))
    tuned = softprompt.load(tmp_path / "x")
    own = [each.text for each in tuned.generate(TEXTS, max_new_tokens=12)]
    theirs = answers(model, tokenizer, facts["prompts"]["x"])
    assert [tuned.rows.decode(ids) for ids in theirs] == own


@pytest.mark.parametrize("name", only(["phi", "t5"], ["gpt2", "gemma3", "phi", "t5"]))
@torch.no_grad()
def test_the_logits_of_real_tokens_are_the_prompts(tmp_path, name):
    facts, model, _ = exported(tmp_path, name)
    tuned = softprompt.load(tmp_path / "x")
    base, source = tuned.base.model, torch.tensor([5, 6, 7])
    rows = torch.cat([load_adapter(tmp_path / "x").values, base.get_input_embeddings()(source)])
    ids = torch.cat([torch.tensor(facts["prompts"]["x"]["token_ids"]), source])
    start = {"decoder_input_ids": torch.tensor([[0, 9]])} if name == "t5" else {}
    expected = base(inputs_embeds=rows[None], **start).logits
    came = model(input_ids=ids[None], **start).logits[..., :VOCABULARY]
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", only(["phi"], ["phi", "bart"]))
@torch.no_grad()
def test_a_bias_masks_exactly(tmp_path, name):
    facts, model, _ = exported(tmp_path, name)
    assert facts["extra_mass"] == 0
    start = {"decoder_input_ids": torch.tensor([[2, 9]])} if name == "bart" else {}
    logits = model(input_ids=torch.tensor([[VOCABULARY, 5]]), **start).logits
    assert float(logits.softmax(-1)[..., VOCABULARY:].sum()) == 0


@pytest.mark.parametrize("name", only(["llama"], ["gpt2", "llama"]))
@torch.no_grad()
def test_without_suppression_the_highest_logit_is_a_real_token(tmp_path, name):
    """An engine that knows nothing of generation_config still gets the same greedy text."""
    facts, model, _ = exported(tmp_path, name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (8, 30), generator=generator)
    prompt = torch.tensor(facts["prompts"]["x"]["token_ids"]).expand(8, -1)
    logits = model(input_ids=torch.cat([prompt, ids], 1)).logits
    assert int(logits.argmax(-1).max()) < VOCABULARY
    extra = logits[..., VOCABULARY:]
    donors = (logits[..., :VOCABULARY, None] == extra[..., None, :]).all(-1)
    assert donors.any(-1).all()


@pytest.mark.slow
def test_the_demo_model_keeps_its_likelihoods(tmp_path):
    write_prompt(tmp_path / "x", "demo", seed=1)
    facts = convert(tmp_path / "x", tmp_path / "out", to="extended-vocab").facts
    assert facts["extra_mass"] < 1e-4
    model, tokenizer = plain(tmp_path / "out")
    tuned = softprompt.load(tmp_path / "x")
    own = [each.text for each in tuned.generate(TEXTS, max_new_tokens=8)]
    theirs = answers(model, tokenizer, facts["prompts"]["x"], new=8)
    assert [tuned.rows.decode(ids) for ids in theirs] == own


def test_several_prompts_in_one_export(tmp_path):
    facts, model, tokenizer = exported(tmp_path, names=("first", "second"), name="gpt2")
    for each in ("first", "second"):
        tuned = softprompt.load(tmp_path / each)
        own = [one.text for one in tuned.generate(TEXTS, max_new_tokens=8)]
        theirs = answers(model, tokenizer, facts["prompts"][each], new=8)
        assert [tuned.rows.decode(ids) for ids in theirs] == own
    ids = [facts["prompts"][each]["token_ids"] for each in ("first", "second")]
    assert ids[0][-1] + 1 == ids[1][0]
    written = json.loads((tmp_path / "out" / "softprompt_prompts.json").read_text())
    assert written["prompts"] == facts["prompts"]


@pytest.mark.parametrize("extra", only([-40], [-40, 0, 7]))
def test_a_tokenizer_with_more_or_fewer_ids_than_rows(tmp_path, extra):
    """The ids of the new tokens are the indices of their rows, in either case."""
    count = len(byte_bpe())
    base = write_base(tmp_path / "base", "llama", vocabulary=count + extra)
    facts, model, tokenizer = exported(tmp_path, base=base)
    ids = facts["prompts"]["x"]["token_ids"]
    first = max(count, count + extra)
    assert ids == list(range(first, first + P))
    assert [tokenizer.convert_tokens_to_ids(f"<sp:x:{i}>") for i in range(P)] == ids
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[ids], load_adapter(tmp_path / "x").values)
    assert len(rows) == first + P == len(tokenizer)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == byte_bpe(bos=True)(text)["input_ids"]


def test_a_padded_vocabulary_keeps_its_own_rows(tmp_path):
    """The base can give ids that its tokenizer lacks, so their rows are not used for prompts."""
    facts, model, _ = exported(tmp_path)
    base, _ = plain(tmp_path / "base")
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], base.get_input_embeddings().weight)


def test_generation_settings_suppress_the_new_ids(tmp_path):
    _, model, _ = exported(tmp_path)
    assert model.generation_config.suppress_tokens == list(range(VOCABULARY, VOCABULARY + P))
    base, _ = plain(tmp_path / "base")
    assert base.generation_config.suppress_tokens is None


def test_rounding_to_the_bases_dtype_is_reported(tmp_path):
    base = write_base(tmp_path / "base", "gemma3", dtype=torch.bfloat16)
    facts, model, _ = exported(tmp_path, base=base)
    assert model.dtype == torch.bfloat16
    assert 0 < facts["rounding"] < 2**-7
    (tmp_path / "wide").mkdir()
    facts, model, _ = exported(tmp_path / "wide", base=base, torch_dtype="float32")
    assert facts["rounding"] < 1e-6


def test_a_base_in_memory_is_not_changed(tmp_path):
    base = write_base(tmp_path / "base", "gpt2")
    write_prompt(tmp_path / "x", base)
    model, tokenizer = plain(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert(tmp_path / "x", tmp_path / "out", to="extended-vocab", base_model=model, tokenizer=tokenizer)
    assert model.config.tie_word_embeddings
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(tokenizer) == len(byte_bpe(bos=True))


def test_a_seq2seq_head_of_its_own_stays_so(tmp_path):
    """T5 1.1: tied embeddings, another head, and a config that says tied all the same."""
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))
    model.save_pretrained(tmp_path / "base")
    byte_bpe().save_pretrained(tmp_path / "base")
    facts, export, tokenizer = exported(tmp_path, base=str(tmp_path / "base"))
    assert facts["head"] == "least likely row"
    tuned = softprompt.load(tmp_path / "x")
    own = [each.text for each in tuned.generate(TEXTS, max_new_tokens=6)]
    theirs = answers(export, tokenizer, facts["prompts"]["x"], new=6)
    assert [tuned.rows.decode(ids) for ids in theirs] == own


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    """The folder of a prompt beside its base."""
    folder = tmp_path_factory.mktemp("prompt")
    return Path(write_prompt(folder / "x", write_base(folder / "base", "llama")))


@pytest.mark.parametrize("name", ["..", "a/b", "", "x y", "é", "a" * 65, ".", "<x>"])
def test_a_name_is_no_path_and_no_markup(tmp_path, prompt, name):
    with pytest.raises(ConfigError, match="a prompt's name is 1 to 64"):
        convert(prompt, tmp_path / "out", to="extended-vocab", add={name: prompt})
    assert not (tmp_path / "out").exists()


def test_names_do_not_collide(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_prompt(tmp_path / "x", base)
    with pytest.raises(ConfigError, match="two prompts are called 'x'"):
        convert(tmp_path / "x", tmp_path / "out", to="extended-vocab", add={"x": tmp_path / "x"})
    convert(tmp_path / "x", tmp_path / "out", to="extended-vocab")
    with pytest.raises(ArtifactError, match="already has '<sp:x:0>'"):
        convert(
            tmp_path / "x", tmp_path / "again", to="extended-vocab",
            base_model=str(tmp_path / "out"), ignore_fingerprint=True,
        )  # fmt: skip


def test_only_an_earlier_export_is_replaced(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_prompt(tmp_path / "x", base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="no earlier export"):
        convert(tmp_path / "x", tmp_path / "mine", to="extended-vocab", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    convert(tmp_path / "x", tmp_path / "out", to="extended-vocab")
    with pytest.raises(OutputExistsError, match="new or empty"):
        convert(tmp_path / "x", tmp_path / "out", to="extended-vocab")
    os.symlink(tmp_path / "out", tmp_path / "link")
    convert(tmp_path / "x", tmp_path / "link", to="extended-vocab", name="y", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    found = json.loads((tmp_path / "out" / "softprompt_prompts.json").read_text())
    assert list(found["prompts"]) == ["y"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_failure_leaves_the_earlier_export(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", "llama")
    write_prompt(tmp_path / "x", base)
    convert(tmp_path / "x", tmp_path / "out", to="extended-vocab")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(self, directory, **options):
        (directory / "half").write_text("x")
        raise OSError("No space left on device")

    monkeypatch.setattr(tf.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(ArtifactError, match="No space left"):
        convert(tmp_path / "x", tmp_path / "out", to="extended-vocab", overwrite=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_model_that_answers_otherwise_is_refused(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", "llama")
    write_prompt(tmp_path / "x", base)
    monkeypatch.setattr(extended_model, "_scale", lambda table: 2.0)
    with pytest.raises(ArtifactError, match="gives other logits"):
        convert(tmp_path / "x", tmp_path / "out", to="extended-vocab")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_an_embedding_that_does_more_than_scale_is_refused():
    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    with pytest.raises(ArtifactError, match="more than look embeddings up and scale"):
        extended_model._scale(Shifted(8, 4))


def test_fillers_and_prompt_tokens_keep_the_text_as_it_is():
    tokenizer = byte_bpe()
    before = [tokenizer(text)["input_ids"] for text in TEXTS]
    ids = add_prompt_tokens(tokenizer, len(tokenizer) + 3, {"a": 2, "b": 1})
    assert ids == {"a": [len(byte_bpe()) + 3, len(byte_bpe()) + 4], "b": [len(byte_bpe()) + 5]}
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == before
    text = "<sp:a:0> x <sp:b:0>"
    inner = tokenizer(" x ")["input_ids"]
    assert tokenizer(text)["input_ids"] == [ids["a"][0], *inner, ids["b"][0]]
    assert tokenizer.decode(ids["a"], skip_special_tokens=True) == ""


def test_every_prompt_is_checked(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    small, big = write_prompt(tmp_path / "small", base), tmp_path / "big"
    rows = {"prompt_embeddings": torch.full((P, 32), 1e6)}
    write_prompt(big, base, tensors=rows)
    half = {"to": "extended-vocab", "torch_dtype": "float16"}
    for first, added in ((big, small), (small, big)):
        name = big.name if first is big else "other"
        with pytest.raises(ArtifactError, match=f"virtual tokens of {name} overflow float16"):
            convert(first, tmp_path / "out", add={"other": added}, **half)
    assert not (tmp_path / "out").exists()


def test_the_limits_of_each_prompt_are_recorded(tmp_path):
    record, _, _ = exported(tmp_path, names=("x", "y"))
    for entry in record["prompts"].values():
        assert (entry["max_source_length"], entry["max_target_length"]) == (64, 16)


TWO_TASKS = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2, "num_ranks": 1}


def two_tasks():
    shapes = {
        "prompt_embeddings": (P, 32),
        "prefix_task_cols": (2, P, 1),
        "prefix_task_rows": (2, 1, 32),
    }
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def test_one_task_of_further_prompts(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    tasks = write_prompt(tmp_path / "tasks", base, tensors=two_tasks(), **TWO_TASKS)
    one = write_prompt(tmp_path / "one", base)
    options = {"to": "extended-vocab", "add": {"second": tasks}}
    with pytest.raises(ConfigError, match=r"further prompt second: .*2 tasks.*--add-task"):
        convert(one, tmp_path / "out", **options)
    convert(one, tmp_path / "out", add_tasks={"second": 1}, **options)
    model, _ = plain(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "softprompt_prompts.json").read_text())
    ids = record["prompts"]["second"]["token_ids"]
    names = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    shared, cols, rows = (load_adapter(tasks).tensors[name] for name in names)
    expected = shared * (cols[1] @ rows[1])
    torch.testing.assert_close(model.get_input_embeddings().weight[ids], expected)


def test_a_task_keeps_its_own_template(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    stored = load_adapter(write_prompt(tmp_path / "tasks", base, tensors=two_tasks(), **TWO_TASKS))
    own = {"template": "Own: {{input}}", "task": "classification", "labels": ["a", "b"]}
    told = {"tasks": {"first": own | {"template": "x {{input}}"}, "second": own}}
    manifest = dataclasses.replace(stored.manifest, tasks=("first", "second"), data=told)
    save_adapter(tmp_path / "named", stored.config, stored.tensors, manifest, overwrite=False)
    convert(tmp_path / "named", tmp_path / "one", to="softprompt", task_name="second")
    found = load_adapter(tmp_path / "one").manifest
    assert (found.template, found.labels, found.task) == (
        "Own: {{input}}",
        ("a", "b"),
        "classification",
    )
