"""A base whose folder brings Python code along, as a stranger's might."""

from __future__ import annotations

import json

from oracles.families import causal
from oracles.tokenizers import byte_bpe


def base_with_code(tmp_path, monkeypatch):
    """Return the folder of the base, and the file that its code makes when it runs."""
    folder, mark = tmp_path / "base", tmp_path / "ran"
    causal("llama").save_pretrained(folder)
    byte_bpe().save_pretrained(folder)
    config = folder / "config.json"
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mine", "auto_map": auto}))
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class Config(LlamaConfig):\n    model_type = 'mine'\n"
    (folder / "code.py").write_text(code + "class Model(LlamaForCausalLM):\n    config_class = Config\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, mark
