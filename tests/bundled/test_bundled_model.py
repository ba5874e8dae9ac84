from __future__ import annotations

from pathlib import Path

import softprompt.bundled
from softprompt.bundled import complaints, model_directory


def test_paths_lie_inside_the_package():
    package = Path(softprompt.bundled.__file__).parent
    assert model_directory() == package / "model"
    assert complaints("test") == package / "complaints" / "test.jsonl"


def test_the_model_folder_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in model_directory().iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files.keys()
    assert sum(files.values()) <= 16 * 2**20
