"""What conversion refuses, in one line, and what it says instead of losing it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from oracles.tiny_bases import P, write_base, write_prompt
from softprompt.artifacts import load_adapter, save_adapter
from softprompt.errors import ArtifactError, ConfigError
from softprompt.inference import convert


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "llama", "llama")


@pytest.fixture(scope="module")
def prompt(tmp_path_factory, base):
    return write_prompt(tmp_path_factory.mktemp("prompts") / "causal", base)


def refused(expected, *arguments, error=ArtifactError, **options):
    with pytest.raises(error, match=expected) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(tmp_path, base):
    torch.save(torch.nested.nested_tensor([torch.ones(P, 32)]), tmp_path / "p.pt")
    refused("plain dense", tmp_path / "p.pt", tmp_path / "out", to="peft", base_model=base)


def test_bytes_behind_an_array(tmp_path, base):
    np.save(tmp_path / "p.npy", np.ones((P, 32), np.float32))
    with (tmp_path / "p.npy").open("ab") as stream:
        stream.write(b"garbage")
    refused("7 bytes follow", tmp_path / "p.npy", tmp_path / "x", to="peft", base_model=base)


def test_the_name_of_a_request(tmp_path, prompt):
    refused("end its name in .json", prompt, tmp_path / "r.txt", to="vllm", text="x",
            error=ConfigError)  # fmt: skip
    refused("tensor writes a .* file, got 'r.txt'; end its name in one of these", prompt, tmp_path / "r.txt",
            to="tensor", error=ConfigError)  # fmt: skip
    refused("vllm writes the request for one input text; pass text", prompt, tmp_path / "r.json", to="vllm",
            error=ConfigError)  # fmt: skip


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x\n", "a: " + "[" * 2000 + "]" * 2000])
def test_yaml_that_could_grow_is_not_loaded(tmp_path, prompt, text):
    convert(prompt, tmp_path / "c", to="caikit")
    (tmp_path / "c" / "config.yml").write_text(text)
    refused(r"expected plain YAML in .*config.yml, it cannot be read \(it has an alias, or is nested more than",
            tmp_path / "c", tmp_path / "out", to="peft")  # fmt: skip


@pytest.mark.parametrize(("to", "name"), [("npy", "p.npy"), ("caikit", "folder"), ("tgis", "folder")])
def test_a_place_that_cannot_be_written_to(tmp_path, prompt, to, name):
    (tmp_path / "file").write_text("x")
    refused("could not write .*; nothing there was changed: free some space or choose another path",
            prompt, tmp_path / "file" / name, to=to)  # fmt: skip


def test_values_beyond_the_bases_dtype(tmp_path, base):
    large = {"prompt_embeddings": torch.full((P, 32), 1e6)}
    prompt = write_prompt(tmp_path / "large", base, tensors=large)
    refused("virtual tokens overflow float16, the base's dtype; pass torch_dtype=float32 or bfloat16", prompt,
            tmp_path / "r.json", to="vllm", text="x", torch_dtype="float16")  # fmt: skip


def test_halves_of_unlike_length(tmp_path):
    base = write_base(tmp_path / "t5", "t5")
    (tmp_path / "tgis").mkdir()
    for name, length in (("encoder", 3), ("decoder", 4)):
        torch.save(torch.ones(length, 32), tmp_path / "tgis" / f"{name}.pt")
    refused(r"one shape for encoder and decoder in .*, got \[3, 32\] and \[4, 32\]: convert them one by one",
            tmp_path / "tgis", tmp_path / "out", to="peft", base_model=base)  # fmt: skip


def test_a_configuration_without_weights(tmp_path, prompt):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text((Path(prompt) / "adapter_config.json").read_text())
    refused("no adapter_model.safetensors or adapter_model.bin", tmp_path / "half", tmp_path / "out", to="npy")


def test_a_further_prompt_that_does_not_name_its_base(tmp_path, prompt):
    convert(prompt, tmp_path / "p.npy", to="npy")
    refused(r"p.npy \(npy\) does not name its base; convert it to softprompt first", prompt, tmp_path / "out",
            to="extended-vocab", add={"b": tmp_path / "p.npy"}, error=ConfigError)  # fmt: skip


def test_the_dtype_of_torch_is_named_as_ours(tmp_path, prompt):
    convert(prompt, tmp_path / "c", to="caikit")
    config = tmp_path / "c" / "config.yml"
    config.write_text(config.read_text().replace("_dtype: float32", "_dtype: torch.bfloat16"))
    convert(tmp_path / "c", tmp_path / "out", to="softprompt")
    assert load_adapter(tmp_path / "out").manifest.dtype == "bfloat16"


def test_a_request_says_that_its_input_was_cut(tmp_path, prompt, caplog):
    whole = convert(prompt, tmp_path / "a.json", to="vllm", text="it is late")
    assert whole.facts["input_cut"] is False
    assert not caplog.text
    cut = convert(prompt, tmp_path / "b.json", to="vllm", text="it is late " * 40)
    assert cut.facts["input_cut"] is True
    assert cut.facts["tokens"] == P + 64
    assert "max_source_length of 64 tokens, and lost its end" in caplog.text


@pytest.mark.parametrize("given", [5, None, b"x", ["a"]])
def test_what_is_no_path(tmp_path, prompt, given):
    refused("expected a path to convert", given, tmp_path / "x", to="peft", error=ConfigError)
    refused("expected a path to convert", prompt, given, to="peft", error=ConfigError)


def test_a_record_is_made_where_there_is_none_or_asked_for(tmp_path, base):
    plain = write_prompt(tmp_path / "plain", base, manifest=False)
    refused("no softprompt.json.*--base-model.*--to peft", plain, tmp_path / "x", to="softprompt",
            error=ConfigError)  # fmt: skip
    asked = {"to": "softprompt", "base_model": base, "template": "Text: {{input}} Label:"}
    done = convert(plain, tmp_path / "out", **asked)
    assert (done.source_format, done.lost) == ("peft", ())
    made = load_adapter(tmp_path / "out")
    assert torch.equal(made.values, load_adapter(plain).values)
    assert made.manifest.template == "Text: {{input}} Label:"
    assert made.manifest.base_fingerprint["model_type"] == "llama"
    assert (made.manifest.base_model, made.manifest.labels) == (base, None)
    convert(plain, tmp_path / "p.npy", to="npy")
    convert(tmp_path / "p.npy", tmp_path / "back", **asked)
    assert load_adapter(tmp_path / "back").manifest.template == "Text: {{input}} Label:"


@pytest.mark.parametrize(
    ("to", "lost"),
    [
        ("softprompt", set()),
        ("peft", set()),
        ("caikit", {"labels", "task", "metrics", "max_source_length", "max_target_length"}),
        ("extended-vocab", {"metrics", "task", "base_fingerprint"}),
    ],
)
def test_what_is_lost_is_said_and_is_on_the_page(tmp_path, prompt, to, lost):
    stored = load_adapter(prompt)
    manifest = dataclasses.replace(
        stored.manifest, task="classification", labels=("a", "b"), metrics={"accuracy": 0.5}
    )
    save_adapter(tmp_path / "p", stored.config, stored.tensors, manifest, overwrite=False)
    found = convert(tmp_path / "p", tmp_path / "out", to=to).lost
    assert set(found) - {"base_fingerprint"} == lost - {"base_fingerprint"}
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{to}` |")]
    assert all(f"`{name}`" in row for name in found)


def test_a_request_for_one_task_has_its_template(tmp_path, base):
    shapes = {
        "prompt_embeddings": (P, 32),
        "prefix_task_cols": (2, P, 1),
        "prefix_task_rows": (2, 1, 32),
    }
    factors = {name: torch.rand(shape) for name, shape in shapes.items()}
    kind = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2, "num_ranks": 1}
    stored = load_adapter(write_prompt(tmp_path / "t", base, tensors=factors, **kind))
    long, short = (
        {"template": template, "task": "generation", "labels": None}
        for template in ("A long template: {{input}}", "{{input}}")
    )
    told = {"tasks": {"long": long, "short": short}}
    manifest = dataclasses.replace(stored.manifest, tasks=("long", "short"), data=told)
    save_adapter(tmp_path / "n", stored.config, stored.tensors, manifest, overwrite=False)
    counts = [
        convert(tmp_path / "n", tmp_path / f"{task}.json", to="vllm", text="x", task_name=task).facts["tokens"]
        for task in ("long", "short")
    ]
    assert counts[0] > counts[1] + 5


def test_caikits_names_have_no_spaces(tmp_path, prompt):
    stored = load_adapter(prompt)
    manifest = dataclasses.replace(stored.manifest, template="{{input}} of {{Tweet text}}")
    save_adapter(tmp_path / "p", stored.config, stored.tensors, manifest, overwrite=False)
    refused(
        "its template has the field 'Tweet text', and names of caikit", tmp_path / "p", tmp_path / "c", to="caikit"
    )
    assert not (tmp_path / "c").exists()


def test_caikit_has_no_chats(tmp_path, prompt):
    stored = load_adapter(prompt)
    manifest = dataclasses.replace(stored.manifest, chat=True)
    save_adapter(tmp_path / "p", stored.config, stored.tensors, manifest, overwrite=False)
    refused("it was trained on chats", tmp_path / "p", tmp_path / "c", to="caikit")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("mark", ["#", "^"])
def test_caikit_has_no_sections(tmp_path, prompt, mark):
    stored = load_adapter(prompt)
    section = f"{{{{{mark}topic}}}}"
    manifest = dataclasses.replace(stored.manifest, template=f"{section}One: {{{{/topic}}}}{{{{input}}}} Label:")
    save_adapter(tmp_path / "p", stored.config, stored.tensors, manifest, overwrite=False)
    said = f"its template has the section {re.escape(section)}, and caikit would print its marks"
    refused(said, tmp_path / "p", tmp_path / "c", to="caikit")
    assert not (tmp_path / "c").exists()
