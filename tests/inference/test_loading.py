"""One entry: a folder gives a prompt, a mapping of folders gives prompts that answer together."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import MappingProxyType

import pytest

from oracles.served import served
from softprompt import Bounds, Serving, TunedPrompt, load, load_many
from softprompt.errors import ArtifactError, BackboneError, ConfigError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base = served("llama", kinds=("plain", "suffix", "prefix"))
    root = tmp_path_factory.mktemp("prompts")
    for name, tuned in base.prompts.items():
        tuned.save(root / name)
    return base, root


def test_a_folder_is_one_prompt_and_a_mapping_is_many(saved):
    base, root = saved
    memory = {"base_model": base.model, "tokenizer": base.tokenizer}
    for folder in (root / "plain", str(root / "plain")):
        assert isinstance(load(folder, **memory), TunedPrompt)
    folders = {"a": root / "plain", "b": str(root / "prefix"), "c": root / "suffix"}
    bounds = Bounds(max_batch_rows=2, max_queue=3)
    texts = ["is it good", "the parcel is late", "bad"]
    kinds = {"a": "plain", "b": "prefix", "c": "suffix"}
    alone = [
        base.prompts[kinds[name]].generate(text, max_new_tokens=6)[0]
        for name, text in zip("abc", texts, strict=True)
    ]
    with load(MappingProxyType(folders), **memory, bounds=bounds) as serving:
        assert isinstance(serving, Serving)
        assert (serving.prompts, serving.batcher.bounds) == (("a", "b", "c"), bounds.settled("cpu"))
        assert serving.generate(texts, prompts=["a", "b", "c"], max_new_tokens=6) == alone
        found = serving.agenerate(texts, prompts=["a", "b", "c"], max_new_tokens=6)
        assert asyncio.run(found) == alone
        assert "".join(serving.stream(texts[1], "b", max_new_tokens=6)) == alone[1].text


def test_a_folder_that_peft_wrote_is_served_as_it_is_loaded(saved, tmp_path):
    base, root = saved
    for file in (root / "plain").iterdir():
        if file.name != "softprompt.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    memory = {"base_model": base.model, "tokenizer": base.tokenizer}
    (alone,) = load(tmp_path, **memory).generate("is it good", max_new_tokens=6)
    with load({"it": tmp_path}, **memory) as serving:
        assert serving.generate("is it good", prompts="it", max_new_tokens=6) == [alone]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "at least one prompt to serve, got none"),
        ({1: "plain"}, "a text as the name of a prompt, got 1"),
        ({"": "plain"}, "a text as the name of a prompt, got ''"),
        ({"a": None}, r"expected a prompt's folder, or folders by name, .* got None"),
        (["plain"], r"expected a prompt's folder, or folders by name, .* got \['plain'\]"),
    ],
)
def test_what_is_neither_is_refused_before_anything_is_read(given, told):
    with pytest.raises(ConfigError, match=told) as caught:
        load(given, "no such base")
    assert "\n" not in str(caught.value)


def test_what_is_refused(saved):
    base, root = saved
    with pytest.raises(ConfigError, match="bounds are for prompts by name"):
        load(root / "plain", base.model, bounds=Bounds())
    with pytest.raises(ArtifactError, match="nowhere"):
        load({"a": root / "plain", "b": root / "nowhere"}, base.model, tokenizer=base.tokenizer)
    with pytest.raises(BackboneError):
        load({"a": root / "plain"}, Path("no such base"))
    with pytest.raises(ConfigError, match="folders of one prompt or more"):
        load_many({"a": root / "plain"})
