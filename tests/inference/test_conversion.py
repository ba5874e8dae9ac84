"""Prompts through every format and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import softprompt
from oracles.payloads import read_payload
from oracles.slow import only
from oracles.tiny_bases import P, write_base, write_prompt
from softprompt.artifacts import load_adapter, save_adapter
from softprompt.errors import (
    ArtifactError,
    BackboneError,
    ConfigError,
    FingerprintError,
    OutputExistsError,
)
from softprompt.inference import convert

BOTH = {
    "peft_type": "EXTENDED_PROMPT_TUNING",
    "output_model_types": ["ENCODER", "DECODER"],
    "num_transformer_submodules": 2,
}
DECODER = {"peft_type": "EXTENDED_PROMPT_TUNING", "output_model_types": ["DECODER"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name in ("llama", "t5"):
        write_base(root / name, name)
    write_base(root / "wide", "llama", hidden_size=48)
    write_base(root / "other", "llama", seed=9)
    return root


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, bases):
    root = tmp_path_factory.mktemp("prompts")
    llama, t5 = str(bases / "llama"), str(bases / "t5")
    write_prompt(root / "causal", llama)
    write_prompt(root / "unnamed", llama, manifest=False, base_model_name_or_path=None)
    write_prompt(root / "encoder", t5)
    write_prompt(root / "both", t5, **BOTH)
    write_prompt(root / "decoder", t5, **DECODER)
    write_prompt(root / "suffix", llama, peft_type="EXTENDED_PROMPT_TUNING", placement="suffix")
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "prompt_embeddings": (P, 32),
        "prefix_task_cols": (2, P, 3),
        "prefix_task_rows": (2, 3, 32),
    }
    factors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    multitask = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2, "num_ranks": 3}
    write_prompt(root / "tasks", llama, tensors=factors, **multitask)
    kv = {"peft_type": "PREFIX_TUNING", "num_layers": 2, "token_dim": 16}
    write_prompt(root / "kv", llama, tensors={"prompt_embeddings": torch.ones(P, 64)}, **kv)
    return root


@pytest.fixture
def caikit(tmp_path, written_once):
    """A causal prompt in caikit's format, to damage."""
    return shutil.copytree(written_once, tmp_path / "out")


@pytest.fixture(scope="module")
def written_once(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("caikit") / "out"
    convert(prompts / "causal", folder, to="caikit")
    return folder


def rows_of(path):
    return load_adapter(path).values


def refused(expected, *arguments, error=ArtifactError, **options):
    with pytest.raises(error, match=expected) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", ["caikit", "tgis"])
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("causal", ["decoder.pt"]),
        pytest.param("encoder", ["encoder.pt"], marks=pytest.mark.slow),
        pytest.param("decoder", ["decoder.pt"], marks=pytest.mark.slow),
        ("both", ["decoder.pt", "encoder.pt"]),
    ],
)
def test_parts_go_both_ways(tmp_path, prompts, bases, to, name, files):
    done = convert(prompts / name, tmp_path / "out", to=to)
    assert (done.source_format, done.output_format) == ("softprompt", to)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    if name != "decoder" or to == "caikit":
        base = None if to == "caikit" else str(bases / ("llama" if name == "causal" else "t5"))
        convert(tmp_path / "out", tmp_path / "back", to="softprompt", base_model=base)
        back, first = load_adapter(tmp_path / "back"), load_adapter(prompts / name)
        assert torch.equal(back.values, first.values)
        for key in ("peft_type", "task_type", "num_virtual_tokens", "output_model_types"):
            assert back.config.get(key) == first.config.get(key)
        template = first.manifest.template if to == "caikit" else "{{input}}"
        assert back.manifest.template == template
    assert [each for each in written if each != "config.yml"] == files
    for file in files:
        part = torch.load(tmp_path / "out" / file, weights_only=True)
        assert part.shape == (P, 32)


def test_a_caikit_folder_has_the_keys_of_caikit(tmp_path, prompts, bases):
    convert(prompts / "both", tmp_path / "out", to="caikit")
    config = yaml.safe_load((tmp_path / "out" / "config.yml").read_text())
    assert config["module_id"] == "6655831b-960a-4dc5-8df4-867026e2cd41"
    assert config["base_model_name"] == str(bases / "t5")
    assert config["base_model_config"]["model_type"] == "t5"
    assert "_name_or_path" not in config["base_model_config"]
    assert config["verbalizer"] == "Text : {{input}} Label : "
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert config["eos_token"] == "</s>"
    assert config["has_base_model"] is False
    assert json.loads(config["output_model_types"]) == ["ENCODER", "DECODER"]
    assert (config["ENCODER"], config["DECODER"]) == ("encoder.pt", "decoder.pt")


def test_a_caikit_prompt_needs_no_base_and_then_has_no_fingerprint(tmp_path, prompts, bases):
    convert(prompts / "causal", tmp_path / "out", to="caikit")
    text = (tmp_path / "out" / "config.yml").read_text()
    (tmp_path / "out" / "config.yml").write_text(text.replace("CAUSAL_LM", "TaskType.CAUSAL_LM"))
    done = convert(tmp_path / "out", tmp_path / "back", to="peft")
    assert done.base_model is None
    assert load_adapter(tmp_path / "back").manifest.base_fingerprint == {}
    mine, theirs = softprompt.load(prompts / "causal"), softprompt.load(tmp_path / "back")
    assert mine.generate("it is late")[0].text == theirs.generate("it is late")[0].text
    convert(tmp_path / "out", tmp_path / "checked", to="peft", base_model=str(bases / "llama"))
    assert load_adapter(tmp_path / "checked").manifest.base_fingerprint["sizes"]
    wide = str(bases / "t5")
    refused("base with model_type 'llama'", tmp_path / "out", tmp_path / "x", to="peft",
            base_model=wide, error=FingerprintError)  # fmt: skip


# PEFT 0.21 reads a property that transformers 5.23 has renamed; nothing of ours is involved.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_computes_the_same_from_a_converted_caikit_prompt(tmp_path, prompts, bases):
    convert(prompts / "causal", tmp_path / "out", to="caikit")
    convert(tmp_path / "out", tmp_path / "back", to="peft")
    base = softprompt.load(prompts / "causal").base.model
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "back"))
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, rows_of(prompts / "causal"))


@pytest.mark.parametrize("file", only(["p.npy", "p.safetensors"], ["p.npy", "p.safetensors", "p.pt", "p.bin"]))
@pytest.mark.parametrize("name", ["causal", "encoder"])
def test_bare_tensors_go_both_ways(tmp_path, prompts, bases, name, file):
    to = "npy" if file.endswith("npy") else "tensor"
    convert(prompts / name, tmp_path / file, to=to)
    base = str(bases / ("llama" if name == "causal" else "t5"))
    convert(tmp_path / file, tmp_path / "back", to="peft", base_model=base)
    back = load_adapter(tmp_path / "back")
    assert torch.equal(back.values, rows_of(prompts / name))
    assert back.config["base_model_name_or_path"] == base
    assert back.manifest.base_fingerprint["model_type"] == ("llama" if name == "causal" else "t5")


def test_the_files_are_what_others_read(tmp_path, prompts):
    rows = rows_of(prompts / "causal")
    convert(prompts / "causal", tmp_path / "p.npy", to="npy")
    assert np.array_equal(np.load(tmp_path / "p.npy", allow_pickle=False), rows.numpy())
    convert(prompts / "causal", tmp_path / "p.pt", to="tensor")
    assert torch.equal(torch.load(tmp_path / "p.pt", weights_only=True), rows)
    convert(prompts / "causal", tmp_path / "p.safetensors", to="tensor")
    assert torch.equal(load_file(tmp_path / "p.safetensors")["prompt_embeddings"], rows)


def test_bfloat16_rows_survive_numpy(tmp_path, prompts, bases):
    rows = rows_of(prompts / "causal").bfloat16()
    save_file({"x": rows}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.npy", to="npy", base_model=str(bases / "llama"))
    assert np.array_equal(np.load(tmp_path / "b.npy"), rows.float().numpy())


def test_one_task_of_a_multitask_prompt_is_baked(tmp_path, prompts):
    stored = load_adapter(prompts / "tasks")
    shared, cols, rows = (
        stored.tensors[f"pr{name}"] for name in ("ompt_embeddings", "efix_task_cols", "efix_task_rows")
    )
    for task in (0, "1"):
        convert(prompts / "tasks", tmp_path / f"t{task}", to="peft", task_name=task)
        baked = load_adapter(tmp_path / f"t{task}")
        torch.testing.assert_close(baked.values, shared * (cols[int(task)] @ rows[int(task)]))
        assert baked.config["peft_type"] == "PROMPT_TUNING"
        assert not baked.config.keys() & {"num_tasks", "num_ranks"}
    convert(prompts / "tasks", tmp_path / "p.npy", to="npy", task_name=1)
    assert np.array_equal(np.load(tmp_path / "p.npy"), rows_of(tmp_path / "t1").numpy())
    convert(prompts / "tasks", tmp_path / "whole", to="peft")
    assert load_adapter(tmp_path / "whole").tensors.keys() == stored.tensors.keys()


def test_tasks_by_name(tmp_path, prompts):
    stored = load_adapter(prompts / "tasks")
    manifest = dataclasses.replace(stored.manifest, tasks=("reviews", "posts"))
    save_adapter(tmp_path / "p", stored.config, stored.tensors, manifest, overwrite=False)
    convert(tmp_path / "p", tmp_path / "a.npy", to="npy", task_name="posts")
    convert(prompts / "tasks", tmp_path / "b.npy", to="npy", task_name=1)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    refused("no task 'post' .did you mean 'posts'.*reviews, posts", tmp_path / "p",
            tmp_path / "c.npy", to="npy", task_name="post", error=ConfigError)  # fmt: skip


@pytest.mark.parametrize("task", [2, -1, "x"])
def test_a_task_that_is_not_there(tmp_path, prompts, task):
    refused("has no task .*0 to 1", prompts / "tasks", tmp_path / "x.npy", to="npy", task_name=task,
            error=ConfigError)  # fmt: skip


def test_keys_and_values_stay_in_pefts_folder(tmp_path, prompts):
    convert(prompts / "kv", tmp_path / "out", to="peft")
    assert torch.equal(rows_of(tmp_path / "out"), rows_of(prompts / "kv"))
    for to in ("caikit", "tgis", "npy", "tensor", "extended-vocab", "vllm"):
        text = {"text": "x"} if to == "vllm" else {}
        refused("keys and values of every layer", prompts / "kv", tmp_path / "x.npy", to=to, **text)


def test_options_that_a_format_cannot_express(tmp_path, prompts, bases):
    refused(
        "PEFT would run another model.*--to softprompt",
        prompts / "suffix",
        tmp_path / "x",
        to="peft",
    )
    refused("stands elsewhere .suffix.", prompts / "suffix", tmp_path / "x", to="caikit")
    convert(prompts / "suffix", tmp_path / "out", to="softprompt")
    assert load_adapter(tmp_path / "out").config["placement"] == "suffix"
    blind = {"peft_type": "EXTENDED_PROMPT_TUNING", "prompt_sees_input": False}
    write_prompt(tmp_path / "blind", str(bases / "t5"), **blind)
    refused("prompt_sees_input", tmp_path / "blind", tmp_path / "x", to="tgis")
    for name in ("both", "decoder"):
        refused("decoder of a seq2seq model", prompts / name, tmp_path / "x.npy", to="npy")
    refused(
        "several|2 tasks .0 to 1.; name the one",
        prompts / "tasks",
        tmp_path / "x",
        to="tgis",
        error=ConfigError,
    )
    refused("causal models only", prompts / "encoder", tmp_path / "x.json", to="vllm", text="x")


def test_trained_heads_are_not_dropped(tmp_path, prompts, bases):
    stored = load_adapter(prompts / "causal")
    tensors = {**stored.tensors, "base_model.score.weight": torch.ones(2, 32)}
    save_adapter(tmp_path / "p", stored.config, tensors, overwrite=False)
    refused(
        "parts besides its virtual tokens .base_model.score.weight",
        tmp_path / "p",
        tmp_path / "x",
        to="tgis",
    )


def test_the_half_that_peft_never_reads_is_left_out(tmp_path, bases):
    two = {"num_transformer_submodules": 2}
    write_prompt(tmp_path / "p", str(bases / "t5"), **two)
    convert(tmp_path / "p", tmp_path / "out", to="tgis")
    part = torch.load(tmp_path / "out" / "encoder.pt", weights_only=True)
    assert torch.equal(part, rows_of(tmp_path / "p")[:P])
    assert not (tmp_path / "out" / "decoder.pt").exists()


def test_tgis_limits(tmp_path, prompts, bases):
    refused("prefix id", prompts / "causal", tmp_path / "a.b", to="tgis", error=ConfigError)
    odd = {"num_virtual_tokens": 3, "tensors": {"prompt_embeddings": torch.ones(3, 32)}}
    write_prompt(tmp_path / "odd", str(bases / "t5"), **odd)
    refused("even number of virtual tokens", tmp_path / "odd", tmp_path / "out", to="tgis")


@torch.no_grad()
def test_a_vllm_request_holds_what_the_model_sees(tmp_path, prompts):
    convert(prompts / "causal", tmp_path / "r.json", to="vllm", text="it is late ")
    body = json.loads((tmp_path / "r.json").read_text())
    assert (body["max_tokens"], body["temperature"]) == (16, 0)
    payload = read_payload(tmp_path / "r.json")
    tuned = softprompt.load(prompts / "causal")
    source, _ = tuned.rows.source({"input": "it is late "})
    base = tuned.base.model
    expected = torch.cat([rows_of(prompts / "causal"), base.get_input_embeddings()(torch.tensor(source))])
    assert source[0] == tuned.tokenizer.bos_token_id
    assert torch.equal(payload, expected)
    mask = torch.ones(1, len(payload)).long()
    ids = base.generate(inputs_embeds=payload[None], attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert tuned.rows.decode(ids[0]) == tuned.generate("it is late ", max_new_tokens=8)[0].text


@pytest.mark.parametrize("to", ["caikit", "tgis", "softprompt"])
def test_folders_are_not_overwritten_unasked(tmp_path, prompts, to):
    convert(prompts / "causal", tmp_path / "out", to=to)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    refused("new or empty", prompts / "encoder", tmp_path / "out", to=to, error=OutputExistsError)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    convert(prompts / "encoder", tmp_path / "out", to=to, overwrite=True)
    assert not (to == "tgis" and (tmp_path / "out" / "decoder.pt").exists())


def test_files_are_not_overwritten_unasked(tmp_path, prompts):
    convert(prompts / "causal", tmp_path / "p.npy", to="npy")
    refused("exists: choose", prompts / "encoder", tmp_path / "p.npy", to="npy", error=OutputExistsError)
    convert(prompts / "encoder", tmp_path / "p.npy", to="npy", overwrite=True)
    (tmp_path / "d.npy").mkdir()
    refused("is a folder", prompts / "causal", tmp_path / "d.npy", to="npy", overwrite=True,
            error=OutputExistsError)  # fmt: skip
    refused("is a file", prompts / "causal", tmp_path / "p.npy", to="softprompt", overwrite=True,
            error=OutputExistsError)  # fmt: skip


def test_a_folder_never_becomes_two_prompts(tmp_path, prompts):
    convert(prompts / "causal", tmp_path / "out", to="softprompt")
    refused("would be two at once", prompts / "causal", tmp_path / "out", to="caikit",
            overwrite=True, error=OutputExistsError)  # fmt: skip


def test_the_base_is_checked(tmp_path, prompts, bases):
    other = {"to": "caikit", "base_model": str(bases / "other")}
    refused("made for", prompts / "causal", tmp_path / "x", error=FingerprintError, **other)
    convert(prompts / "causal", tmp_path / "x", ignore_fingerprint=True, **other)
    wide = {"to": "peft", "base_model": str(bases / "wide")}
    convert(prompts / "causal", tmp_path / "p.npy", to="npy")
    refused("expected virtual tokens 48 wide .*got 32", tmp_path / "p.npy", tmp_path / "y", **wide)


def test_a_base_of_another_kind_or_width(tmp_path, prompts, bases):
    other = {"to": "caikit", "error": ArtifactError}
    plain = prompts / "unnamed"
    refused(
        "is for CAUSAL_LM, .* a seq2seq model",
        plain,
        tmp_path / "x",
        base_model=str(bases / "t5"),
        **other,
    )
    refused("virtual tokens 48 wide", plain, tmp_path / "x", base_model=str(bases / "wide"), **other)
    write_prompt(tmp_path / "p", str(bases / "llama"), task_type="SEQ_CLS")
    refused("it is for SEQ_CLS", tmp_path / "p", tmp_path / "x", to="tgis")


def test_what_is_missing_is_asked_for(tmp_path, prompts):
    convert(prompts / "causal", tmp_path / "p.npy", to="npy")
    refused("does not say which base", tmp_path / "p.npy", tmp_path / "x", to="peft", error=ConfigError)
    refused("does not say which base", prompts / "unnamed", tmp_path / "x", to="caikit")
    refused("vllm writes the request", prompts / "causal", tmp_path / "x", to="vllm", error=ConfigError)
    refused("neither a folder nor", prompts / "causal", tmp_path / "x", to="caikit",
            base_model="nowhere/at-all", error=BackboneError)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"text": "x"},
        {"name": "x"},
        {"add": {"x": "y"}},
        {"task_name": 0},
        {"torch_dtype": "float32"},
    ],
)
def test_options_that_would_be_ignored(tmp_path, prompts, options):
    destination = tmp_path / "x.npy"
    refused(
        "ignored|selects a part|for extended|vllm.s request",
        prompts / "causal",
        destination,
        to="npy",
        error=ConfigError,
        **options,
    )
    if "task" in options:
        refused(
            "selects a part",
            prompts / "causal",
            tmp_path / "x",
            to="peft",
            error=ConfigError,
            **options,
        )
    assert not destination.exists()


def test_formats_that_are_only_written(tmp_path, prompts):
    convert(prompts / "causal", tmp_path / "r.json", to="vllm", text="x")
    refused("which is only written", tmp_path / "r.json", tmp_path / "x", to="peft")


class Bomb:
    def __reduce__(self):
        return (os.system, ("echo bomb > bomb.txt",))


HOSTILE = {
    "code": (Bomb(), "holds code"),
    "nan": (torch.full((P, 32), torch.nan), "expected finite numbers"),
    "sparse": (torch.ones(P, 32).to_sparse(), "plain dense"),
    "3-D": (torch.ones(1, P, 32), r"\[1, 4, 32\]"),
    "1-D": (torch.ones(32), r"\[32\]"),
    "empty": (torch.ones(0, 32), r"\[0, 32\]"),
    "integers": (torch.ones(P, 32).long(), "int64"),
    "width": (torch.ones(P, 31), "got 31"),
    "list": ([1.0, 2.0], "got a list"),
    "two": ({"a": torch.ones(P, 32), "b": torch.ones(P, 32)}, "got 2 .a, b."),
    "none": ({}, "got 0"),
}


@pytest.mark.parametrize("kind", only(["code", "list", "nan", "width", "none"], HOSTILE))
def test_hostile_tensors(tmp_path, bases, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    value, expected = HOSTILE[kind]
    torch.save(value, tmp_path / "p.pt")
    base = {"to": "peft", "base_model": str(bases / "llama")}
    refused(expected, tmp_path / "p.pt", tmp_path / "out", **base)
    if kind not in ("two", "none"):
        (tmp_path / "store").mkdir()
        torch.save(value, tmp_path / "store" / "decoder.pt")
        refused(expected, tmp_path / "store", tmp_path / "out", **base)
    assert not (tmp_path / "bomb.txt").exists()
    assert not (tmp_path / "out").exists()


def test_hostile_arrays(tmp_path, bases):
    base = {"to": "peft", "base_model": str(bases / "llama")}
    np.save(tmp_path / "o.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    refused("allow_pickle=False", tmp_path / "o.npy", tmp_path / "out", **base)
    np.save(tmp_path / "p.npy", np.ones((P, 32), np.float32))
    data = (tmp_path / "p.npy").read_bytes()
    for size in (0, 7, 60, len(data) - 4):
        (tmp_path / "t.npy").write_bytes(data[:size])
        refused("truncated or damaged", tmp_path / "t.npy", tmp_path / "out", **base)
    (tmp_path / "t.safetensors").write_bytes(data)
    refused("truncated or damaged", tmp_path / "t.safetensors", tmp_path / "out", **base)
    np.save(tmp_path / "big.npy", np.ones((P, 32), ">f4"))
    convert(tmp_path / "big.npy", tmp_path / "out", **base)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"verbalizer": None}, "expected a text for verbalizer"),
        pytest.param({"task_type": 7}, "expected a text for task_type", marks=pytest.mark.slow),
        ({"DECODER": "../decoder.pt"}, "leads elsewhere"),
        ({"DECODER": "/etc/passwd"}, "leads elsewhere"),
        pytest.param({"DECODER": ["decoder.pt"]}, "leads elsewhere", marks=pytest.mark.slow),
        ({"DECODER": "gone.pt"}, "is not in it: copy it beside"),
        ({"DECODER": ".."}, "leads elsewhere"),
        ({"task_type": "TOKEN_CLS"}, "CAUSAL_LM or SEQ_2_SEQ_LM for task_type"),
        pytest.param({"task_type": "causal_lm"}, "CAUSAL_LM or SEQ_2_SEQ_LM for task_type", marks=pytest.mark.slow),
        ({"trained_torch_dtype": "evil"}, "float64 for trained_torch_dtype"),
        pytest.param({"trained_torch_dtype": 5}, "float64 for trained_torch_dtype", marks=pytest.mark.slow),
        ({"verbalizer": "no fields"}, "placeholder such as {{input}}"),
        pytest.param({"verbalizer": "{{input"}, "placeholder such as {{input}}", marks=pytest.mark.slow),
        ({"DECODER": ""}, "expected virtual tokens for DECODER .*got none"),
        ({"ENCODER": "decoder.pt"}, "a causal model, got ENCODER, DECODER"),
    ],
)
def test_damaged_caikit_configs(tmp_path, caikit, change, expected):
    path = caikit / "config.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    refused(expected, caikit, tmp_path / "x", to="peft")


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "!!python/object/apply:os.system ['echo bomb']", "\x00"])
def test_yaml_that_is_no_config(tmp_path, caikit, text):
    (caikit / "config.yml").write_text(text)
    refused("config.yml", caikit, tmp_path / "x", to="peft")
