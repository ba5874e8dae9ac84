"""``vllm``: the JSON body of one request to vLLM's ``/v1/completions`` with ``prompt_embeds``.

The server must run with ``--enable-prompt-embeds``. The tensor is what the base's embedding
module returns for the text's ids, prompt in front, in the base's dtype.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.artifacts.formats.format import (
    MEASURED,
    USED,
    Export,
    Format,
    input_tokens,
    write_output_file,
)
from softprompt.artifacts.formats.tensor_files import tensor_bytes
from softprompt.backbone import input_embedding, side_embeddings
from softprompt.errors import ArtifactError, ConfigError

_KEY = "prompt_embeds"
_MAX_NEW_TOKENS = 20


def _lacks(path: Path) -> str | None:
    return None if path.is_file() and path.suffix == ".json" else "not a .json file"


@torch.no_grad()
def _write(export: Export, path: Path) -> Mapping[str, Any]:
    stored, prompt, base = export.single(), export.prompt(), export.loaded()
    if path.suffix != ".json":
        raise ConfigError(f"vllm writes a .json file, got {path.name!r}; end its name in .json")
    if stored.seq2seq:
        raise ArtifactError(
            f"{export.stored.location} is for a seq2seq model, and vLLM takes prompt_embeds for "
            "causal models only; serve it with tgis"
        )
    if not export.source:
        raise ConfigError("vllm writes the request for one input text; pass text (--text)")
    if side_embeddings(base.model):
        raise ArtifactError(
            f"{base.name} has per-layer embedding tables, so embeddings alone are not its input; "
            "use its prompts with softprompt"
        )
    table = input_embedding(base.model)
    tokens = input_tokens(prompt, stored.location)
    ids = torch.tensor(export.source, device=table.weight.device)
    text: Tensor = table(ids)
    joined = torch.cat([tokens.to(text.device, text.dtype), text])  # [P + T, H]
    if not bool(torch.isfinite(joined).all()):
        raise ArtifactError(
            f"the virtual tokens overflow {str(text.dtype).removeprefix('torch.')}, the base's dtype; pass "
            "torch_dtype=float32 or bfloat16"
        )
    manifest = stored.manifest
    body = {
        "model": base.name,
        "max_tokens": manifest.max_target_length if manifest else _MAX_NEW_TOKENS,
        "temperature": 0,
        _KEY: base64.b64encode(tensor_bytes(joined)).decode(),
    }
    write_output_file(path, json.dumps(body).encode() + b"\n", overwrite=export.overwrite)
    return {"tokens": len(joined), "width": joined.shape[1], "dtype": str(joined.dtype)[6:]}


VLLM = Format(
    "vllm",
    "a .json file, the body of one request with prompt_embeds",
    _lacks,
    None,
    _write,
    writes_with_base=True,
    holds="file",
    loses=(*USED, *MEASURED, "template", "base_fingerprint"),
)
