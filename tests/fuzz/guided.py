"""Fuzzing that the covered lines guide: ``python tests/fuzz/guided.py [SECONDS]``, after ``pip install atheris``.

The first byte of an input chooses what reads the rest, as a file. Whatever comes out but records, tensors or
an error of ours in one short line ends the run, and libFuzzer writes the input beside; so does a reader that
takes 10 seconds.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tempfile
from dataclasses import asdict
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

LIMITS = {"max_source_length": 64, "max_target_length": 8, "task": "generation"}
SEEDS = {
    ".json": b'{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}',
    ".toml": b'seed = 1\nverbalizer = "{{input}}"\n[tuning_config]\nnum_virtual_tokens = 4\n',
    ".jsonl": b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
    ".csv": b"input,output\na,b\n",
    ".tsv": b"input\toutput\na\tb\n",
    ".safetensors": b'6\0\0\0\0\0\0\0{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0\0\0\0',
    ".bin": b"",  # see seeds()
    ".txt": b"Message: {{input}}\n{{#body}}Text: {{body}}\n{{/body}}Label:",
    ".yml": b"task_type: CAUSAL_LM\ntrained_torch_dtype: float32\ntuning_type: PROMPT_TUNING\nDECODER: decoder.pt\n"
    b'base_model_name: tiny\nverbalizer: "{{input}}"\n',
    ".record": b"",
    ".npy": b"",
    ".arrow": b"",
    ".parquet": b"",
    ".jsonl.gz": gzip.compress(b'{"input": "a", "output": "b"}\n', mtime=0),
}
SUFFIXES = [*SEEDS]
WIDTH = 256
"""Of the embeddings of the bundled model."""


@cache
def base():
    """Return the bundled model, which formats without a base's name are read for."""
    from softprompt.backbone import load_base

    return load_base("demo")


def seeds() -> dict[str, bytes]:
    """Return a sound file of each kind."""
    import torch

    from softprompt.artifacts import Manifest, pickled_bytes

    array, arrow, columns = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.ones((4, WIDTH), np.float32))
    found = {".bin": pickled_bytes({"prompt_embeddings": torch.ones(1, 2)}), ".npy": array.getvalue()}
    record = Manifest(
        template="{{input}}",
        labels=None,
        base_fingerprint={},
        base_model="demo",
        dtype="float32",
        seq2seq=False,
        **LIMITS,
    )
    found[".record"] = json.dumps(asdict(record)).encode()
    if find_spec("pyarrow") is not None:
        import pyarrow as pa
        from pyarrow import ipc, parquet

        table = pa.table({"input": ["a", "b"], "output": ["x", None], "list": [["p"], []]})
        with ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table)
        parquet.write_table(table, columns)
        found |= {".arrow": arrow.getvalue(), ".parquet": columns.getvalue()}
    return SEEDS | found


def read(path: Path) -> None:
    """Read a file as the command that is given it does."""
    from softprompt.artifacts import detect, load_pickled, load_safetensors
    from softprompt.data import Verbalizer, read_records
    from softprompt.training import read_run

    text = path.read_bytes().decode(errors="replace")
    match path.suffix:
        case ".json" | ".record" | ".yml":
            read_folder(path, text)
        case ".npy":
            detect(path).read(path, base())
        case ".toml":
            read_run(path)
        case ".safetensors":
            load_safetensors(path.read_bytes(), path)
        case ".bin":
            load_pickled(path)
        case ".txt":
            Verbalizer(text)
        case _:
            list(read_records(path, require_target=False))


def read_folder(path: Path, text: str) -> None:
    """Read the folder of a prompt of which a file is one, and the others are sound."""
    import torch
    from safetensors.torch import save_file

    from softprompt.artifacts import detect, parse_object

    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder, values = Path(name), torch.ones(4, WIDTH)
        if path.suffix == ".yml":
            (folder / "config.yml").write_text(text, encoding="utf-8")
            torch.save(values, folder / "decoder.pt")
        else:
            parse_object(text, path.name)
            is_record = path.suffix == ".record"
            configuration = SEEDS[".json"].decode() if is_record else text
            (folder / "adapter_config.json").write_text(configuration, encoding="utf-8")
            save_file({"prompt_embeddings": values}, folder / "adapter_model.safetensors")
            if is_record:
                (folder / "softprompt.json").write_text(text, encoding="utf-8")
        detect(folder).read(folder, base() if path.suffix == ".yml" else None).configuration()


def one(data: bytes, folder: Path) -> None:
    """Read one input; only errors of ours may come out, visible and short."""
    from softprompt.errors import SoftPromptError

    path = folder / f"input{SUFFIXES[data[0] % len(SUFFIXES) if data else 0]}"
    path.write_bytes(data[1:])
    try:
        read(path)
    except SoftPromptError as error:
        assert len(str(error)) <= 1000 and not {"\x1b", "\n", "\0"} & {*str(error)}


def main() -> None:
    """Fuzz for some seconds, or say what is missing."""
    if find_spec("atheris") is None:
        print("atheris is not installed, so no lines guide the fuzzing: pip install atheris brings it")
        return
    import atheris

    with atheris.instrument_imports(include=["softprompt"]):  # the doors alone import nothing
        for name in (
            "artifacts.files",
            "artifacts.pickled",
            "data.records",
            "data.sources",
            "data.template",
            "training.run_file",
        ):
            import_module(f"softprompt.{name}")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, seed in enumerate(seeds().values()):
            (corpus / str(number)).write_bytes(bytes([number]) + seed)
        seconds = sys.argv[1] if len(sys.argv) > 1 else "60"
        words = [sys.argv[0], str(corpus), f"-max_total_time={seconds}", "-timeout=10", "-max_len=65536"]
        atheris.Setup(words, lambda data: one(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
