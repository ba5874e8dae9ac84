"""Prompts come from one folder only, are checked before they are kept, and are noticed when they change."""

import gc
import json
import os
import pickle
import shutil
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracles.serving import app_over, running, until, write_prompt, write_rows
from softprompt import load
from softprompt.errors import AdapterError, ArtifactError, ConfigError, NotServingError, UsageError
from softprompt.server import folder
from softprompt.server.folder import FILES, PromptFolder, is_name
from softprompt.server.registry import Registry

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def registry(prompts, base):
    return Registry(PromptFolder.of(prompts), base, max_resident=8, max_bytes=2**20)


@pytest.mark.parametrize("name", ["a", "A-b_c.d", "9" * 64, "a..b"])
def test_names(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "../a",
        "a\\b",
        "a" * 65,
        "a\n",
        "a\x00",
        "ü",
        "a b",
        "%2e%2e",
    ],
)
def test_names_that_are_none(server, name):
    assert not is_name(name)
    with pytest.raises(AdapterError, match="there is no prompt"):
        server.service.registry.get(name)


def test_a_root_that_is_none(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        PromptFolder.of(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        PromptFolder.of(tmp_path / "file")


def test_listing_reads_no_weights(registry, prompts):
    (prompts / "writer" / WEIGHTS).write_bytes(b"nonsense")
    (prompts / ".complaints.tmp").mkdir()
    (prompts / "no-prompt").mkdir()
    (prompts / "note.txt").write_text("hello")
    assert registry.names() == ["complaints", "pairs", "plain-peft", "writer"]
    assert registry.outline("writer").problem is None
    assert registry.resident == 0


def test_what_is_served_is_what_the_library_loads(registry, prompts, base):
    tuned = load(prompts / "complaints", base.model, tokenizer=base.tokenizer)
    served = registry.get("complaints")
    assert torch.equal(served.prompt.input, tuned.prompt().input)
    assert served.of_fields("hello").ids == tuned.sources("hello")[0][0]
    assert served.labels == tuned.labels
    assert registry.resident == 1
    assert registry.get("complaints") is served


def test_links_out_are_refused(registry, prompts, tmp_path, base):
    outside = write_prompt(tmp_path / "outside", base)
    (prompts / "leads-out").symlink_to(outside)
    (prompts / "inside").symlink_to(prompts / "writer")
    assert "leads-out" not in registry.names()
    with pytest.raises(AdapterError, match="there is no prompt 'leads-out'"):
        registry.get("leads-out")
    assert registry.get("inside").prompt.key == registry.get("writer").prompt.key
    for file in FILES:
        (prompts / "pairs" / file).rename(tmp_path / file)
        (prompts / "pairs" / file).symlink_to(tmp_path / file)
        with pytest.raises(ArtifactError, match=rf"pairs/{file} is a link that leads out"):
            registry.get("pairs")
        (prompts / "pairs" / file).unlink()
        shutil.move(tmp_path / file, prompts / "pairs" / file)
    assert registry.get("pairs").name == "pairs"


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickles_are_not_opened(registry, prompts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    directory = prompts / "writer"
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtifactError, match=r"expected adapter_model\.safetensors in writer"):
        registry.get("writer")
    (directory / "adapter_model.bin").rename(directory / WEIGHTS)
    with pytest.raises(ArtifactError, match="cannot be served"):
        registry.get("writer")
    assert not (tmp_path / "exploded").exists()


def rewritten(directory, rows):
    """Put rows into a folder past the checks of writing."""
    save_file({"prompt_embeddings": rows}, directory / WEIGHTS)
    (directory / "softprompt.json").unlink()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.full((3, 256), float("nan")), "NaN or infinite"),
        (torch.ones(3, 255), "got"),
        (torch.ones(4, 256), "got"),
        (torch.ones(3, 256, dtype=torch.int32), "int32"),
        (torch.ones(3 * 256), "got"),
    ],
)
def test_rows_that_do_not_fit(registry, prompts, rows, words):
    rewritten(prompts / "writer", rows)
    with pytest.raises(ArtifactError, match=words):
        registry.get("writer")
    assert registry.get("complaints").name == "complaints"


def test_a_prompt_of_another_width(registry, prompts, base):
    directory = prompts / "writer"
    rewritten(directory, torch.ones(3, 64))
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace('"token_dim": 256', '"token_dim": 64'))
    with pytest.raises(ArtifactError, match="token_dim is 64, the base demo has 256"):
        registry.get("writer")


def test_a_prompt_of_another_base(registry, prompts, base):
    write_rows(
        prompts / "foreign",
        base,
        torch.ones(2, 256),
        base_fingerprint={"model_type": "llama", "sizes": [1, 2, 3, 4], "values": [0.5]},
    )
    with pytest.raises(ArtifactError, match=r"was made for .*, not for demo: .*, or pass --ignore-fingerprint"):
        registry.get("foreign")
    folder = PromptFolder.of(prompts)
    generous = Registry(folder, base, max_resident=8, max_bytes=2**20, ignore_fingerprint=True)
    assert generous.get("foreign").prompt.input.shape == (2, 256)


def test_trained_heads_are_refused(registry, prompts):
    directory = prompts / "plain-peft"
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, "base_model.lm_head.weight": torch.ones(2, 2)}, directory / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"trained modules \(base_model.lm_head.weight\)"):
        registry.get("plain-peft")


def test_a_file_that_is_too_large(prompts, base):
    registry = Registry(PromptFolder.of(prompts), base, max_resident=8, max_bytes=1000)
    with pytest.raises(ArtifactError, match="larger than 1,000 bytes; raise --max-prompt-bytes"):
        registry.get("writer")


@pytest.mark.parametrize("file", [WEIGHTS, "softprompt.json"])
def test_a_folder_in_the_place_of_a_file_keeps_nothing_open(registry, prompts, file):
    path = prompts / "writer" / file
    path.unlink()
    path.mkdir()
    for _ in range(3):
        with pytest.raises(
            ArtifactError, match=rf"writer/{file} is a folder, a device or a pipe; put a file there"
        ):
            registry.get("writer")
    kept = [os.path.realpath(each.path) for each in os.scandir("/proc/self/fd")]
    assert str(path.resolve()) not in kept


@pytest.mark.parametrize("file", [WEIGHTS, "softprompt.json"])
def test_a_pipe_is_neither_waited_for_nor_read(registry, prompts, file):
    path = prompts / "writer" / file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match=rf"writer/{file} is a folder, a device or a pipe; put a file there"):
        registry.get("writer")
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(end, b"secret")
    with pytest.raises(ArtifactError, match="a device or a pipe"):
        registry.get("writer")
    assert os.read(end, 6) == b"secret"
    os.close(end)


def test_a_change_is_a_new_version(registry, prompts, base):
    before = registry.get("writer")
    write_prompt(prompts / "writer", base, seed=9, task="generation", labels=None)
    after = registry.get("writer")
    assert after.version != before.version
    assert after.prompt.key != before.prompt.key
    assert not torch.equal(after.prompt.input[:2], before.prompt.input[:2])
    os.utime(prompts / "writer" / WEIGHTS, ns=(1, 1))
    assert registry.get("writer").version == after.version


def test_a_template_alone_keeps_the_keys(registry, prompts, base):
    before = registry.get("writer")
    record = prompts / "writer" / "softprompt.json"
    record.write_text(record.read_text().replace("{{input}}", "{{input}} :"))
    after = registry.get("writer")
    assert after.version != before.version
    assert after.prompt.key == before.prompt.key
    assert len(after.of_fields("hello").ids) == len(before.of_fields("hello").ids) + 1


def test_damage_is_found_once_and_healed(registry, prompts, monkeypatch):
    path = prompts / "writer" / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    reads = []
    stored = Registry.stored
    monkeypatch.setattr(Registry, "stored", lambda s, n: reads.append(n) or stored(s, n))
    for _ in range(3):
        with pytest.raises(ArtifactError, match="truncated or damaged"):
            registry.get("writer")
    assert reads == ["writer"]
    path.write_bytes(whole)
    assert registry.get("writer").name == "writer"


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_cannot_be_opened_is_one_line(registry, prompts, file):
    """A link to itself, which not even root can open."""
    path = prompts / "writer" / file
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(
        ArtifactError,
        match=f"writer/{file} cannot be read .*; check the file|expected {file} in writer, it has none",
    ):
        registry.get("writer")
    assert registry.get("pairs").name == "pairs"


def test_a_prompt_deleted_while_it_is_read_is_not_remembered_as_damaged(registry, prompts, base, monkeypatch):
    read = PromptFolder.read

    def deleted_meanwhile(self, name, file, most):
        shutil.rmtree(prompts / name, ignore_errors=True)
        return read(self, name, file, most)

    monkeypatch.setattr(PromptFolder, "read", deleted_meanwhile)
    with pytest.raises(AdapterError, match="there is no prompt 'writer'"):
        registry.get("writer")
    monkeypatch.undo()
    write_prompt(prompts / "writer", base)
    assert registry.get("writer").name == "writer"


def test_a_prompt_deleted_while_they_are_listed_is_in_neither_list(registry, monkeypatch):
    monkeypatch.setattr(PromptFolder, "names", lambda self: ["complaints", "gone", "writer"])
    assert registry.sorted_out() == (["complaints", "writer"], {})


def test_what_is_kept_of_bases_compared_with_is_bounded(registry, prompts, base, monkeypatch):
    monkeypatch.setattr("softprompt.server.registry._COMPARED", 1)
    for name in ("complaints", "writer"):
        record = prompts / name / "softprompt.json"
        found = json.loads(record.read_text())
        found["base_fingerprint"]["model_type"] = name
        record.write_text(json.dumps(found))
    for _ in range(2):
        assert registry.outline("pairs").problem is None
        for name in ("complaints", "writer"):
            with pytest.raises(ArtifactError, match="it was made for demo"):
                registry.get(name)
        assert registry.get("pairs").name == "pairs"
        assert len(registry._compared) == 1


def test_deleted_and_polled(registry, prompts):
    registry.get("writer")
    registry.get("pairs")
    shutil.rmtree(prompts / "writer")
    with pytest.raises(AdapterError, match="there is no prompt 'writer'"):
        registry.get("writer")
    assert registry.poll() == ["writer"]
    assert registry.resident == 1
    assert registry.poll() == []


def test_a_folder_that_goes_while_it_is_polled_is_missed_from_then_on(registry, prompts, monkeypatch):
    registry.get("writer")
    stamp = folder._stamp

    def goes(path):
        if prompts.exists():
            prompts.rename(prompts.with_name("away"))
        return stamp(path)

    monkeypatch.setattr(folder, "_stamp", goes)
    assert registry.poll() == ["writer"]
    for _ in range(2):
        with pytest.raises(NotServingError, match="cannot be read"):
            registry.poll()
    monkeypatch.undo()
    prompts.with_name("away").rename(prompts)
    assert registry.poll() == []
    assert registry.get("writer").name == "writer"


def test_the_least_used_goes(prompts, base):
    registry = Registry(PromptFolder.of(prompts), base, max_resident=2, max_bytes=2**20)
    first = registry.get("writer")
    registry.get("pairs")
    assert registry.get("writer") is first
    registry.get("complaints")
    assert registry.resident == 2
    assert registry.is_resident("writer")
    assert not registry.is_resident("pairs")


def test_unloaded_prompts_are_gone_until_loaded(registry):
    served = registry.get("writer")
    registry.unload("writer")
    assert "writer" not in registry.names()
    with pytest.raises(AdapterError, match="is unloaded"):
        registry.get("writer")
    assert registry.load("writer").version == served.version
    assert registry.get("writer") is not served
    assert registry.reload("writer").version == served.version


def test_the_base_is_no_prompt(registry):
    for ask in (registry.load, registry.unload, registry.reload, registry.stored, registry.outline):
        with pytest.raises(AdapterError, match="'demo' is the base model, not a prompt"):
            ask("demo")


def test_a_prompt_with_the_bases_name_is_served_under_another(registry, prompts, base):
    """What ``softprompt demo`` writes to ``runs/demo``, served over the base ``demo``."""
    write_prompt(prompts / "demo", base, seed=9, length=6)
    assert registry.get("demo").prompt is None
    assert "demo-prompt" in registry.names()
    assert registry.get("demo-prompt").prompt.tokens == 6
    assert registry.stored("demo-prompt")[0].config["num_virtual_tokens"] == 6
    with pytest.raises(AdapterError, match="'demo' is the base model, not a prompt"):
        registry.load("demo")
    # A folder that has that name already keeps it.
    write_prompt(prompts / "demo-prompt", base, seed=9, length=5)
    assert registry.get("demo-prompt").prompt.tokens == 5
    assert registry.get("demo-prompt-prompt").prompt.tokens == 6


def test_the_base_answers_to_the_names_it_is_given(prompts, base):
    write_prompt(prompts / "demo", base, length=6)
    names = ("small", "complaints")
    registry = Registry(PromptFolder.of(prompts), base, max_resident=8, max_bytes=2**20, base_names=names)
    assert registry.get("small") is registry.get("complaints") is registry.base_served
    assert registry.base_served.name == "small"
    assert registry.get("demo").prompt.tokens == 6
    assert {"demo", "complaints-prompt"} < set(registry.names())


def test_a_folders_path_is_no_name(prompts, base, tmp_path):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    for name in (tmp_path / "models" / "llama", "/srv/gone/llama", "/srv/gone/llama.gguf"):
        there = type(base)(base.model, base.tokenizer, str(name))
        registry = Registry(PromptFolder.of(prompts), there, max_resident=8, max_bytes=2**20)
        assert registry.base_names == ("llama" if "gguf" not in str(name) else "llama.gguf",), name
    hub = type(base)(base.model, base.tokenizer, "org/llama")
    assert Registry(PromptFolder.of(prompts), hub, max_resident=8, max_bytes=2**20).base_names == ("org/llama",)


def test_tasks(registry):
    with pytest.raises(ConfigError, match="the base model, which has no tasks"):
        registry.get("demo", 0)
    with pytest.raises(ConfigError, match="no task 'x'"):
        registry.get("writer", "x")
    assert registry.get("writer", 0).name == "writer"


def test_a_thousand_prompts_cost_nothing_until_called(tmp_path, base):
    first = write_prompt(tmp_path / "p0000", base)
    for number in range(1, 1000):
        directory = tmp_path / f"p{number:04}"
        directory.mkdir()
        for file in FILES:
            os.link(first / file, directory / file)
    registry = Registry(PromptFolder.of(tmp_path), base, max_resident=8, max_bytes=2**20)
    assert len(registry.names()) == 1000
    assert registry.resident == 0
    started = time.perf_counter()
    registry.get("p0500")
    cold = time.perf_counter() - started
    assert registry.resident == 1
    assert registry.poll() == []
    assert cold < 1


def test_many_threads_load_once_each(registry, prompts, monkeypatch):
    reads = []
    stored = Registry.stored
    monkeypatch.setattr(Registry, "stored", lambda s, n: reads.append(n) or stored(s, n))
    found = []
    threads = [
        threading.Thread(target=lambda name=name: found.append(registry.get(name)))
        for name in ["writer", "pairs", "complaints"] * 5
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == ["complaints", "pairs", "writer"]
    assert len(found) == 15
    assert len({id(each) for each in found}) == 3


def test_a_prompt_replaced_while_it_is_read(registry, prompts, base, monkeypatch):
    """Old weights with a new record are never put together."""
    other = write_prompt(prompts.parent / "other", base, seed=12, length=5)
    read, done = PromptFolder.read, []

    def replaced_meanwhile(self, name, file, most):
        data = read(self, name, file, most)
        if file == "adapter_config.json" and not done:
            done.append(name)
            for each in FILES:
                shutil.copy(other / each, prompts / name / each)
        return data

    monkeypatch.setattr(PromptFolder, "read", replaced_meanwhile)
    served = registry.get("writer")
    assert served.prompt.tokens == 5
    assert done == ["writer"]


def test_a_write_in_the_same_tick_of_the_clock_is_seen(registry, prompts, base, monkeypatch):
    """Where file times move in steps, a file written twice within one looks as if written once."""
    other = write_prompt(prompts.parent / "other", base, seed=13, length=2, manifest=False)
    weights, stamp, read = prompts / "plain-peft" / WEIGHTS, folder._stamp, PromptFolder.read

    def in_steps(path):
        found = stamp(path)
        return found and (*found[:2], *(each // 10**7 * 10**7 for each in found[2:]))

    def written_again(self, name, file, most):
        data = read(self, name, file, most)
        if file == WEIGHTS:
            monkeypatch.setattr(PromptFolder, "read", read)
            weights.write_bytes((other / WEIGHTS).read_bytes())
        return data

    monkeypatch.setattr(folder, "_stamp", in_steps)
    monkeypatch.setattr(PromptFolder, "read", written_again)
    weights.write_bytes(weights.read_bytes())
    registry.get("plain-peft")
    expected = load(other, base.model, tokenizer=base.tokenizer).prompt().input
    assert torch.equal(registry.get("plain-peft").prompt.input, expected)


def test_what_is_unloaded_is_freed_at_once(prompts, base):
    """Garbage of cycles waits for a full collection, which is rare beside a model: a server grew 42 kB a load."""
    gc.disable()
    try:
        with running(app_over(base, prompts)) as server, server.client() as client:
            body = {"model": "complaints", "prompt": "late", "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
            texts = {"model": "complaints", "input": ["late", "fine"]}
            assert client.post("/v1/classify", json=texts).status_code == 200
            registry = server.service.registry
            kept = weakref.ref(registry.get("complaints").own)
            assert kept() is not None
            registry.unload("complaints")
            until(lambda: kept() is None)
    finally:
        gc.enable()


def test_a_loaded_prompt_is_freed_when_nobody_has_it(prompts, base):
    gc.disable()
    try:
        prompt = load(prompts / "complaints", base.model, tokenizer=base.tokenizer)
        assert prompt("late") == prompt.of_task(0)("late") == prompt.of_task(0).of_task(0)("late")
        prompt.generate("late", max_new_tokens=2)
        kept = [weakref.ref(prompt), weakref.ref(prompt.snapshot()), weakref.ref(prompt.module)]
        del prompt
        assert [each() for each in kept] == [None, None, None]
    finally:
        gc.enable()
