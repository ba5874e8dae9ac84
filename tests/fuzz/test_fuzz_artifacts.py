"""Artifact files made to be wrong or costly: softprompt's errors come out, soon, in little memory, in one line."""

from __future__ import annotations

import io
import json
import os
import pickletools
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from oracles.stored import drawn, folder
from softprompt.artifacts import RecordedBase, load_adapter, model_card
from softprompt.cli.main import run
from softprompt.errors import SoftPromptError
from softprompt.inspection import describe, inspect_prompt, similar_prompts
from softprompt.prompts import PeftConfig
from softprompt.server.folder import PromptFolder, outlined
from softprompt.training import list_sources, read_run

CONFIG, RECORD = "adapter_config.json", "softprompt.json"
EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
"""How many a long run tries (``make fuzz``), other ones each time."""
MOST_SECONDS, MOST_MEGABYTES = 2.0, 200

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [[], {}, [[]], {"a": []}, "\ud800", "\x1b[31m", 10**30, -1, 0, 1e308, "x" * 300, "x" * 3_000_000, "a\0b"]
    ),
    st.recursive(
        st.none(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
    ),
)
INNER = st.sampled_from(
    ["validation", "train", "tasks", "path", "input_field", "sizes", "values", "model_type", "epoch"]
)
PLACES = st.sampled_from(["", "data", "metrics", "settings", "base_fingerprint", "versions", "history"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a folder of a sound prompt, and beside it another, both to be copied."""
    root = tmp_path_factory.mktemp("sound")
    return folder(root / "sound", drawn(0), data={"validation": {"path": "v.jsonl"}}, metrics={"validation": {}})


def looked_at(path: Path) -> None:
    """Do with a folder what reads it without its base."""
    stored = load_adapter(path)
    stored.configuration()
    str(stored.base_model)
    json.dumps(describe(stored).to_dict())
    model_card(stored.config, stored.manifest, repo_id="a/b")
    RecordedBase.of_stored(stored)
    columns_of(stored)
    inspect_prompt(path, with_base=False).to_dict()


def columns_of(stored) -> None:
    """Look the columns of a record up, as evaluation does."""
    for name in ("input_field", "output_field"):
        {}.get(stored.manifest.settings.get(name) if stored.manifest else None)


@pytest.mark.filterwarnings("ignore:Unexpected keyword")  # of a file without a method
@settings(max_examples=int(EXAMPLES or 40), derandomize=not EXAMPLES)
@given(file=st.sampled_from([CONFIG, RECORD]), key=st.integers(0, 60), place=PLACES, inner=INNER, value=HOSTILE)
def test_a_wrong_value_anywhere_is_an_error_of_ours(whole, tmp_path_factory, file, key, place, inner, value):
    path = tmp_path_factory.mktemp("p") / "one"
    shutil.copytree(whole, path)
    values = json.loads((path / file).read_text())
    name = sorted(values)[key % len(values)]
    if file == RECORD and place:
        values[place] = {**values[place], inner: value} if isinstance(values[place], dict) else [value]
    else:
        values[name] = value
    (path / file).write_text(json.dumps(values))
    for look in (
        looked_at,
        PeftConfig.from_pretrained,
        lambda path: outline(path.parent),
        lambda path: list_sources(path.parent),
    ):
        try:
            look(path)
        except SoftPromptError as error:
            assert len(str(error)) <= 1000
            assert "\x1b" not in str(error)
            assert "\n" not in str(error)
    assert similar_prompts(whole, path.parent) is not None
    assert run(["info", str(path), "--without-base"]) in (0, 2)


def outline(root: Path) -> None:
    found = PromptFolder.of(root)
    for name in found.names():
        outlined(found, name, found.signature(name), 64 << 20, lambda config, manifest: None)


def changed(path: Path, file: str, **values) -> None:
    (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | values))


def pickled(path: Path, tensors) -> None:
    (path / "adapter_model.safetensors").unlink()
    (path / RECORD).unlink()
    torch.save(tensors, path / "adapter_model.bin")


def packed(path: Path) -> None:
    pickled(path, {"prompt_embeddings": torch.zeros(1_000_000)})
    file, stream = path / "adapter_model.bin", io.BytesIO()
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as small:
        for each in whole.infolist():
            small.writestr(each.filename, whole.read(each))
    file.write_bytes(stream.getvalue())


def shared_tuples(path: Path) -> None:
    """Write a dict whose key is a pair of pairs of pairs ... of the same pair, 39 deep."""
    pickled(path, {})
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(1, 40))
    with zipfile.ZipFile(path / "adapter_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}(K\x01\x85q\x01" + pairs + b"K\x01u.")
        archive.writestr("a/version", "3")


def program(path: Path) -> None:
    pickled(path, {})
    (path / "adapter_model.bin").write_bytes(b"\x80\x02" + b"N0" * 1_000_000)


def disguised(path: Path) -> None:
    """Write a long program of the old form, with an archive behind it: torch goes by the beginning."""
    program(path)
    with zipfile.ZipFile(path / "adapter_model.bin", "a") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")


def archive(path: Path, program: bytes, name: str = "a/data.pkl", **others: str) -> None:
    """Write a program in the form of ``torch.save``."""
    pickled(path, {})
    with zipfile.ZipFile(path / "adapter_model.bin", "w") as records:
        for other, content in others.items():
            records.writestr(f"a/{other}.pkl", content)
        records.writestr(name, program)
        records.writestr("a/version", "3")


NAMED, CLASS = b"\x80\x02}X\x01\x00\x00\x00a", b"ccollections\nOrderedDict\n"
SIZE = b"\x8a\x05" + (1 << 29).to_bytes(5, "little")
MADE = NAMED + b"c__builtin__\nbytearray\n" + SIZE + b"\x85Rs."
STACKED = NAMED + b"X\x08\x00\x00\x00builtinsX\x09\x00\x00\x00bytearray\x93" + SIZE + b"\x85Rs."
DOUBLED = b"c_codecs\nencode\n" * 28 + b"X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R"
DOUBLED = NAMED + DOUBLED + b"X\x03\x00\x00\x00hex\x86R" * 27 + b"s."


def copied(once: bytes) -> bytes:
    """Return a program that copies a dict of 20,000 entries, in the memo beside its class, 500 times."""
    entries = b"".join(b"J" + number.to_bytes(4, "little") + b"N" for number in range(20_000))
    return b"\x80\x02]" + CLASS + b"q\x00)Ra}q\x01(" + entries + b"ua(" + once * 500 + b"e."


def two_indexes(path: Path) -> None:
    """Write an archive whose index torch finds where it is said to be, and Python where it should be."""
    parts = []
    for program in (MADE, b"\x80\x02}." + b"N" * (len(MADE) - 4)):
        archive(path, program)
        data = (path / "adapter_model.bin").read_bytes()
        at = int.from_bytes(data[-6:-2], "little")
        parts += [data[:at], data[at:-22]]
        (path / "adapter_model.safetensors").touch()
        (path / RECORD).touch()
    for name in ("adapter_model.safetensors", RECORD):
        (path / name).unlink()
    end = data[-22:-6] + len(parts[0]).to_bytes(4, "little") + bytes(2)
    (path / "adapter_model.bin").write_bytes(b"".join(parts) + end)


def grown(path: Path) -> None:
    """Write tensors of the old form over one storage, each of which made it larger by a copy."""
    pickled(path, {})
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    data, parts, at = stream.getvalue(), [], stream.seek(0)
    for _ in range(5):
        texts = [argument for code, argument, _ in pickletools.genops(stream) if code.name == "BINUNICODE"]
        parts.append((data[at : stream.tell()], texts))
        at = stream.tell()
    key = parts[3][1][2].encode()
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key
    storage += b"X\x03\x00\x00\x00cpuK\x02NtQK\x00"
    tensors = b""
    for number in range(2):
        size = b"J" + ((1 << 27) + number).to_bytes(4, "little") + b"\x85K\x01\x85\x89" + CLASS + b")RtR"
        tensors += (
            b"X\x01\x00\x00\x00"
            + b"ab"[number : number + 1]
            + b"ctorch._utils\n_rebuild_tensor_v2\n"
            + storage
            + size
        )
    parts[3] = (b"\x80\x02}(" + tensors + b"u.", [])
    (path / "adapter_model.bin").write_bytes(b"".join(part for part, _ in parts) + data[at:])


def sparse(path: Path, file: str) -> None:
    with (path / file).open("r+b") as stream:
        stream.truncate(20 << 30)


def long_prompt(path: Path) -> None:
    rows = torch.zeros(1_000_000, 2)
    save_file({"prompt_embeddings": rows}, path / "adapter_model.safetensors")
    (path / RECORD).unlink()
    changed(path, CONFIG, num_virtual_tokens=1_000_000, token_dim=2)


def long_header(path: Path) -> None:
    entries = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(20_000)}
    header = json.dumps(entries).encode()
    (path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def caikit(path: Path, text: str) -> None:
    (path / CONFIG).unlink()
    (path / "config.yml").write_text(text)


CAIKIT = {
    "task_type": "CAUSAL_LM",
    "trained_torch_dtype": "float32",
    "tuning_type": "PROMPT_TUNING",
    "DECODER": "decoder.pt",
    "base_model_name": "tiny",
    "verbalizer": '"{{input}}"',
}


def caikit_with(path: Path, key: str, value: str) -> None:
    """Write a sound prompt of caikit's, but for one value."""
    caikit(path, "".join(f"{name}: {each}\n" for name, each in {**CAIKIT, key: value}.items()))
    torch.save(torch.zeros(2, 8), path / "decoder.pt")


def array(path: Path) -> None:
    with (path / "p.npy").open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2, 9_999_999_999)}
        np.lib.format.write_array_header_1_0(stream, header)


def large(path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(30_000, 1024).bfloat16()}, path / "adapter_model.safetensors")
    (path / RECORD).unlink()
    changed(path, CONFIG, num_virtual_tokens=30_000, token_dim=1024)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {k: v}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
)
BOMBS = {
    "expanded": lambda path: pickled(path, {"prompt_embeddings": torch.zeros(1).expand(2_000_000_000)}),
    "packed": packed,
    "tuples": shared_tuples,
    "program": lambda path: (
        pickled(path, {}),
        (path / "adapter_model.bin").write_bytes(b"\x80\x02" + b"N0" * 20_000_000),
    ),
    "disguised": disguised,
    "bytearray": lambda path: archive(path, MADE),
    "bytearray on the stack": lambda path: archive(path, STACKED),
    "hex": lambda path: archive(path, DOUBLED),
    "copies": lambda path: archive(path, copied(b"h\x00h\x01\x85R")),
    "attributes": lambda path: archive(path, copied(b"h\x00)Rh\x01b")),
    "behind five": lambda path: archive(path, MADE, programs="N." * 5),
    "upper case": lambda path: archive(path, MADE, "a/DATA.PKL"),
    "two indexes": two_indexes,
    "grown": grown,
    "sparse weights": lambda path: sparse(path, "adapter_model.safetensors"),
    "sparse record": lambda path: sparse(path, RECORD),
    "sparse configuration": lambda path: sparse(path, CONFIG),
    "large": large,
    "a million tokens": long_prompt,
    "header": long_header,
    "template": lambda path: changed(path, RECORD, template="{{input}}" + "x" * 2_500_000),
    "sections": lambda path: changed(path, RECORD, template="{{input}}" + "{{#a}}" * 20_000),
    "labels": lambda path: changed(path, RECORD, labels=[str(number) for number in range(20_000)]),
    "lists": lambda path: (path / RECORD).write_text('{"data": [' + ",".join(["[]"] * 690_000) + "]}"),
    "deep": lambda path: (path / RECORD).write_text("[" * 2_000_000),
    "deep enough": lambda path: (path / CONFIG).write_text('{"a":' * 900 + "1" + "}" * 900),
    "digits": lambda path: (path / CONFIG).write_text('{"num_virtual_tokens": ' + "9" * 1_900_000 + "}"),
    "laughs": lambda path: caikit(path, LAUGHS),
    "merges": lambda path: caikit(path, MERGES),
    "deep yaml": lambda path: caikit(path, "[" * 200_000),
    **{f"base 60 {key}": partial(caikit_with, key=key, value="1" + ":59" * 83_000) for key in CAIKIT},
    "caikit template": partial(caikit_with, key="verbalizer", value='"' + "x" * 250_000 + '"'),
    "caikit name": partial(caikit_with, key="base_model_name", value="x" * 200_000),
    "caikit zero": partial(caikit_with, key="base_model_name", value='"a\\0b"'),
    "caikit tag": partial(caikit_with, key="tuning_type", value='!!int "' + "9" * 250_000 + '"'),
    "caikit tagged list": partial(caikit_with, key="tuning_type", value="!!int [1]"),
    "array": array,
    "pipe": lambda path: ((path / CONFIG).unlink(), os.mkfifo(path / CONFIG)),
    "loop": lambda path: ((path / RECORD).unlink(), (path / RECORD).symlink_to(RECORD)),
    "device": lambda path: ((path / CONFIG).unlink(), (path / CONFIG).symlink_to("/dev/zero")),
}


def state(path: Path, file: str, content: str = "", **metadata) -> None:
    """Put a file into the state of a run, a pipe where nothing is to be in it."""
    (path / ".state").mkdir()
    if metadata:
        header = json.dumps({"__metadata__": metadata}).encode()
        (path / ".state" / file).write_bytes(len(header).to_bytes(8, "little") + header)
    elif content:
        (path / ".state" / file).write_text(content)
    else:
        os.mkfifo(path / ".state" / file)


def stopped(path: Path, **run) -> None:
    state(path, TENSORS, state=json.dumps({"runs": {"": {"run": run}}}))


def stopped_as(path: Path, text: str) -> None:
    stopped(path, update=3, epoch=1)
    (path / ".state" / "run.toml").write_text(text)


PLAN, TENSORS = "plan.json", "state.safetensors"
STATES = {
    "plan pipe": lambda path: state(path, PLAN),
    "plan sparse": lambda path: (state(path, PLAN, "{"), sparse(path, f".state/{PLAN}")),
    "plan deep": lambda path: state(path, PLAN, '{"command": "distill", "a": ' + "[" * 200_000),
    "plan settings": lambda path: state(path, PLAN, '{"command": "sweep", "settings": [1]}'),
    "plan command": lambda path: state(path, PLAN, json.dumps({"command": "x" * 3_000_000})),
    "plan name": lambda path: state(path, PLAN, json.dumps({"command": "sweep", "settings": {"x" * 300_000: 1}})),
    "state pipe": lambda path: state(path, TENSORS),
    "state sparse": lambda path: (stopped(path, update=1, epoch=1), sparse(path, f".state/{TENSORS}")),
    "state zeros": lambda path: (state(path, TENSORS, "x"), sparse(path, f".state/{TENSORS}")),
    "state deep": lambda path: state(path, TENSORS, state="[" * 300_000),
    "state list": lambda path: state(path, TENSORS, state='{"runs": [1]}'),
    "state nothing": stopped,
    "state epoch": lambda path: stopped(path, update=3, epoch="x"),
    "state update": lambda path: stopped(path, update="\x1b[31m", epoch=1),
    "state digits": lambda path: stopped(path, update=10**4000, epoch=1),
    "state run": lambda path: (stopped(path, update=3, epoch=1), os.mkfifo(path / ".state" / "run.toml")),
    "state run keys": lambda path: stopped_as(path, "a" + ".a" * 12_000 + " = 1\n"),
    "state run table": lambda path: stopped_as(path, "[" + "a . " * 12_000 + "a]\n"),
    "state loop": lambda path: (path / ".state").symlink_to(".state"),
}
READ = """
import sys, time
from pathlib import Path
from softprompt.artifacts import detect, load_adapter
from softprompt.errors import SoftPromptError
from softprompt.data import Verbalizer

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

sound, *others = map(Path, sys.argv[1:])
load_adapter(sound)
for format in ("caikit", "npy"):
    __import__("softprompt.artifacts.formats")
import numpy, yaml
for path in others:
    before, started = peak(), time.process_time()
    try:
        place = path / "p.npy" if (path / "p.npy").exists() else path
        stored = detect(place).read(place, None if place == path else object())
        said = "taken"
        if stored.manifest:
            Verbalizer(stored.manifest.template)
    except SoftPromptError as error:
        said = str(error)
    print(path.name, round(time.process_time() - started, 2), round(peak() - before), said, sep="\\t")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_no_artifact_costs_much_before_it_is_refused(whole, tmp_path):
    for name, make in BOMBS.items():
        shutil.copytree(whole, tmp_path / name)
        make(tmp_path / name)
    words = [sys.executable, "-c", READ, str(whole), *(str(tmp_path / name) for name in BOMBS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(BOMBS)
    assert [line for line in lines if float(line[1]) > MOST_SECONDS] == []
    assert sum(float(line[2]) for line in lines) < MOST_MEGABYTES
    assert {name for name, _, _, said in lines if said == "taken"} == {"large", "loop"}
    assert max(len(said) for *_, said in lines) <= 1000


def test_no_state_that_came_with_a_prompt_hangs_or_ends_what_lists_it(whole, tmp_path, capsys):
    for name, make in STATES.items():
        shutil.copytree(whole, tmp_path / name)
        make(tmp_path / name)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits on a pipe"))
    signal.alarm(60)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(["runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    for name in STATES:
        assert run(["info", str(tmp_path / name), "--without-base"]) == 0
    text = "".join(capsys.readouterr())
    assert run(["runs", str(tmp_path)]) == 0
    text += "".join(capsys.readouterr())
    signal.alarm(0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MOST_MEGABYTES
    assert sorted({each["folder"] for each in found}) == sorted(STATES)
    assert all(any(each["state"] == "finished" for each in found if each["folder"] == name) for name in STATES)
    assert max(map(len, text.splitlines())) <= 1000
    assert "\x1b" not in text


QUOTES = '"', "'", '"' * 3, "'" * 3


@pytest.mark.parametrize(
    "text",
    [f"{'.'.join(quote + 'a' + quote for _ in range(5_000))} = 1" for quote in QUOTES[:2]]
    + [f"a = {quote}x{quote} # '\nb = {quote}#{quote}\n[a{'.a' * 5_000}]" for quote in QUOTES]
    + [f"a = {{b = {quote}x{quote[0]}{quote}, c{'.c' * 5_000} = 1, d = {quote}{quote}}}" for quote in QUOTES[2:]],
)
def test_a_key_of_a_run_file_of_many_parts_is_refused(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(SoftPromptError, match="a key has more than 32 parts"):
        read_run(tmp_path / "run.toml")


@pytest.mark.parametrize("quote", QUOTES)
def test_dots_in_texts_comments_and_numbers_of_a_run_file_are_none_of_a_key(tmp_path, quote):
    dots = "a." * 100
    lines = [f"verbalizer = {quote}{{{{input}}}} {dots}{quote} # {dots}", "[sweep]", f"lr = [{'0.1, ' * 100}]"]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    assert read_run(tmp_path / "run.toml")["sweep"]["lr"] == [0.1] * 100


@pytest.mark.parametrize("piece", ['"', "'", '"\\"', '"' * 3 + "\\", "a", "a ", "a.", "#", "'\n"])
def test_no_run_file_takes_long_to_be_refused(tmp_path, piece):
    (tmp_path / "run.toml").write_text("a = " + piece * (260_000 // len(piece)))
    begun = time.process_time()
    with pytest.raises(SoftPromptError):
        read_run(tmp_path / "run.toml")
    assert time.process_time() - begun < MOST_SECONDS


def test_one_hostile_folder_ends_neither_a_search_nor_a_list(whole, tmp_path, capsys):
    for name in ("expanded", "tuples", "sparse weights", "labels", "deep", "laughs", "pipe", "loop"):
        shutil.copytree(whole, tmp_path / name)
        BOMBS[name](tmp_path / name)
    shutil.copytree(whole, tmp_path / "good")
    (tmp_path / "round").mkdir()
    for name in ("one", "two"):
        (tmp_path / "round" / name).symlink_to(tmp_path)
    (tmp_path / "\x1b]0;title\x07").mkdir()
    assert run(["similar", str(whole), str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert {Path(each["prompt"]).name for each in json.loads(out)["found"]} == {"good", "loop"}
    assert "\x1b" not in err
    assert "u001b" in err
    assert run(["sources", "list", "--source-prompt-base", str(tmp_path)]) == 0
    assert "good" in capsys.readouterr().out
