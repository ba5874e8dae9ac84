"""Fuzzing that the covered lines guide: ``python tests/fuzz/guided.py [SECONDS]``, after ``pip install atheris``.

The first byte of an input chooses what reads the rest, as a file. Whatever comes out but records, tensors or
an error of ours in one short line ends the run, and libFuzzer writes the input beside; so does a reader that
takes 10 seconds.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

SEEDS = {
    ".json": b'{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}',
    ".toml": b'seed = 1\nverbalizer = "{{input}}"\n[tuning_config]\nnum_virtual_tokens = 4\n',
    ".jsonl": b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
    ".csv": b"input,output\na,b\n",
    ".tsv": b"input\toutput\na\tb\n",
    ".safetensors": b'6\0\0\0\0\0\0\0{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0\0\0\0',
    ".bin": b"",  # see seeds()
    ".txt": b"Message: {{input}}\n{{#body}}Text: {{body}}\n{{/body}}Label:",
}
SUFFIXES = [*SEEDS]


def seeds() -> dict[str, bytes]:
    """Return a sound file of each kind."""
    import torch

    from softprompt.artifacts import pickled_bytes

    return SEEDS | {".bin": pickled_bytes({"prompt_embeddings": torch.ones(1, 2)})}


def read(path: Path) -> None:
    """Read a file as the command that is given it does."""
    from softprompt.artifacts import load_pickled, load_safetensors, parse_object
    from softprompt.data import Verbalizer, read_records
    from softprompt.training import read_run

    text = path.read_bytes().decode(errors="replace")
    match path.suffix:
        case ".json":
            parse_object(text, path.name)
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
