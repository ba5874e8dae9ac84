"""``tgis``, ``npy``, ``tensor`` and ``vllm``: bare tensors, which do not name their base.

``tgis`` is a prompt in the prefix store of IBM's text-generation-inference: ``PREFIX_STORE/<id>/`` holds
``encoder.pt`` and ``decoder.pt``, as caikit's folder does; its name is the id in requests. The store also takes a
PEFT folder, which is the format ``peft``. ``npy`` is what google-research/prompt-tuning reads and writes.

``vllm`` is the JSON body of one request to vLLM's ``/v1/completions`` with ``prompt_embeds``. The server
must run with ``--enable-prompt-embeds``. The tensor is what the base's embedding module returns for
the ids of the rendered text, the prompt in its place among them, in the base's dtype.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as bytes_from_tensors
from torch import Tensor

from softprompt.artifacts import (
    MOST_VIRTUAL_TOKENS,
    Origin,
    StoredPrompt,
    check_dtype,
    check_values,
    damaged,
    load_pickled,
    load_safetensors,
    read_bytes,
    require_empty,
    require_no_file,
    write_folder,
)
from softprompt.artifacts.formats.format import (
    DECODER,
    ENCODER,
    MEASURED,
    USED,
    Export,
    Format,
    Lacks,
    Source,
    stored_of_parts,
    write_failed,
    write_output_file,
)
from softprompt.backbone import Base, input_embedding, is_encoder_decoder, side_embeddings
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import PROMPT_KEY, Placement, Prompt

PART_NAMES: Mapping[str, str] = {ENCODER: "encoder.pt", DECODER: "decoder.pt"}
"""Files of a folder of parts; a causal model's virtual tokens are the decoder's."""

_BARE = ("template", "base_model", *USED, *MEASURED, "base_fingerprint", "dtype")
"""Fields of ``softprompt.json`` that a bare tensor loses."""
_PREFIX_ID = re.compile(r"[\w-]+")
_PICKLED = (".pt", ".bin", ".pth")
_SAFE = ".safetensors"
_ONE_TENSOR = f"{_SAFE}, {' or '.join(_PICKLED)}"
_MAX_NEW_TOKENS = 20
"""Answer length of a request to vLLM, where no prompt's record has a limit."""


def check_tokens(tokens: Any, where: str) -> Tensor:
    """Return dense finite virtual tokens ``[P, H]`` on the CPU; raises ArtifactError for anything else."""
    if not isinstance(tokens, Tensor):
        raise ArtifactError(
            f"expected one tensor [P, H] in {where}, got a {type(tokens).__name__}: save the virtual tokens alone"
        )
    check_values("the tensor", tokens, where)
    check_dtype("the tensor", tokens, where)
    if tokens.dim() != 2 or not 0 < len(tokens) <= MOST_VIRTUAL_TOKENS or not tokens.numel():
        raise ArtifactError(
            f"expected one tensor [P, H] (at most {MOST_VIRTUAL_TOKENS:,} virtual tokens, width) in {where}, got "
            f"{list(tokens.shape)}: save the virtual tokens alone"
        )
    return tokens.detach().cpu()


def read_part(path: Path) -> Tensor:
    """Return the virtual tokens ``[P, H]`` in one file; raises ArtifactError as ``check_tokens`` does."""
    return check_tokens(load_pickled(path), str(path))


def parts_of(prompt: Prompt, *, seq2seq: bool) -> dict[str, Tensor]:
    """Return virtual tokens ``[P, H]`` by ENCODER and DECODER, those that are there."""
    encoder, decoder = (prompt.input, prompt.decoder) if seq2seq else (None, prompt.input)
    parts = {ENCODER: encoder, DECODER: decoder}
    return {name: tokens for name, tokens in parts.items() if tokens is not None}


def part_files(parts: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files of a folder of parts, by name."""
    return {PART_NAMES[part]: tensor_bytes(tokens) for part, tokens in parts.items()}


def tensor_bytes(tokens: Tensor) -> bytes:
    """Return what ``torch.save`` writes for a plain tensor."""
    buffer = io.BytesIO()
    torch.save(_plain(tokens), buffer)
    return buffer.getvalue()


def write_parts(path: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write a folder of parts, and remove the files of parts that the prompt does not have.

    Raises:
        OutputExistsError: The folder is not empty, and may not be overwritten.
        ArtifactError: The file system failed.
    """
    require_no_file(path) if overwrite else require_empty(path)
    try:
        write_folder(path, files, stale=PART_NAMES.values())
    except OSError as error:
        raise write_failed(path, error) from error


def _lacks_tgis(path: Path) -> str | None:
    if not path.is_dir():
        return "not a folder"
    if not any((path / name).is_file() for name in PART_NAMES.values()):
        return f"no {' or '.join(PART_NAMES.values())}"
    return None


def _read_tgis(source: Source, base: Base | None) -> StoredPrompt:
    path = Path(source)
    known = _named(base, path)
    found = {part: path / name for part, name in PART_NAMES.items() if (path / name).is_file()}
    parts = {part: read_part(file) for part, file in found.items()}
    return stored_of_parts(parts, Origin.of_base(known), known, str(path))


def _write_tgis(export: Export, path: Path) -> Mapping[str, Any]:
    seq2seq = export.stored.seq2seq
    parts = parts_of(export.prompt(), seq2seq=seq2seq)
    if not _PREFIX_ID.fullmatch(path.name):
        raise ConfigError(
            "expected a folder named by its prefix id, which TGIS makes of letters, digits, _ and -, "
            f"got {path.name!r}: rename it"
        )
    length = len(next(iter(parts.values())))
    if seq2seq and length % 2:
        raise ArtifactError(
            f"TGIS takes an even number of virtual tokens for seq2seq models, this prompt has "
            f"{length}; train one of {length + 1}"
        )
    write_parts(path, part_files(parts), overwrite=export.overwrite)
    return {"prefix_id": path.name}


def _lacks_file(listed: str, *suffixes: str) -> Lacks:
    """Return the check that a path is a file with one of some suffixes, and what errors call them."""

    def lacks(path: Path) -> str | None:
        return None if path.is_file() and path.suffix in suffixes else f"not a {listed} file"

    return lacks


def _read_npy(source: Source, base: Base | None) -> StoredPrompt:
    path = Path(source)
    data = read_bytes(path)
    try:
        stream = io.BytesIO(data)
        array = np.load(stream, allow_pickle=False)
        rest = len(stream.read())
        if rest:
            raise ValueError(f"{rest:,} bytes follow the array")
        tokens = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    # A file that holds objects, or another format under this name, fails in the parser.
    except Exception as error:
        raise damaged(path, len(data), error) from error
    return _stored(tokens, path, base)


def _read_tensor(source: Source, base: Base | None) -> StoredPrompt:
    path = Path(source)
    safe = path.suffix == _SAFE
    loaded: Any = load_safetensors(read_bytes(path), path) if safe else load_pickled(path)
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            names = ", ".join(str(name) for name in list(loaded)[:3]) or "none"
            raise ArtifactError(
                f"expected one tensor [P, H] in {path}, got {len(loaded)} ({names}): save the virtual tokens alone"
            )
        (loaded,) = loaded.values()
    return _stored(loaded, path, base)


def _stored(tokens: Any, path: Path, base: Base | None) -> StoredPrompt:
    known = _named(base, path)
    part = ENCODER if is_encoder_decoder(known.model) else DECODER
    checked = check_tokens(tokens, str(path))
    return stored_of_parts({part: checked}, Origin.of_base(known), known, str(path))


def _named(base: Base | None, path: Path) -> Base:
    if base is None:
        raise ConfigError(f"{path} does not say which base it is for; pass base_model (--base-model)")
    return base


def _plain(tokens: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, without the storage of a larger tensor."""
    return tokens.detach().cpu().contiguous().clone()


def _write_npy(export: Export, path: Path) -> Mapping[str, Any]:
    if path.suffix != ".npy":
        raise ConfigError(f"npy writes a .npy file, got {path.name!r}; end its name in .npy")
    tokens = _plain(export.input_tokens())
    buffer = io.BytesIO()
    # NumPy has no bfloat16; float32 holds it exactly.
    np.save(buffer, (tokens.float() if tokens.dtype == torch.bfloat16 else tokens).numpy())
    write_output_file(path, buffer.getvalue(), overwrite=export.overwrite)
    return {}


def _write_tensor(export: Export, path: Path) -> Mapping[str, Any]:
    tokens = _plain(export.input_tokens())
    if path.suffix == _SAFE:
        data = bytes_from_tensors({PROMPT_KEY: tokens}, metadata={"format": "pt"})
    elif path.suffix in _PICKLED:
        data = tensor_bytes(tokens)
    else:
        raise ConfigError(f"tensor writes a {_ONE_TENSOR} file, got {path.name!r}; end its name in one of these")
    write_output_file(path, data, overwrite=export.overwrite)
    return {}


@torch.no_grad()
def _write_vllm(export: Export, path: Path) -> Mapping[str, Any]:
    stored, base = export.single(), export.loaded()
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
    tokens = export.input_tokens(tuple(Placement))
    if path.suffix != ".json":
        raise ConfigError(f"vllm writes a .json file, got {path.name!r}; end its name in .json")
    ids = torch.tensor(export.source, device=table.weight.device)
    text: Tensor = table(ids)
    before, behind = text[: export.at], text[export.at :]
    joined = torch.cat([before, tokens.to(text.device, text.dtype), behind])  # [P + T, H]
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
        "prompt_embeds": base64.b64encode(tensor_bytes(joined)).decode(),
    }
    write_output_file(path, json.dumps(body).encode() + b"\n", overwrite=export.overwrite)
    return {"tokens": len(joined), "width": joined.shape[1], "dtype": str(joined.dtype)[6:]}


TGIS = Format(
    "tgis",
    "a folder PREFIX_STORE/<id> with encoder.pt, decoder.pt or both",
    _lacks_tgis,
    _read_tgis,
    _write_tgis,
    reads_with_base=True,
    loses=_BARE,
)
NPY = Format(
    "npy",
    "a .npy file with one array [P, H]",
    _lacks_file(".npy", ".npy"),
    _read_npy,
    _write_npy,
    reads_with_base=True,
    holds="file",
    loses=_BARE,
)
TENSOR = Format(
    "tensor",
    "a .safetensors, .pt, .bin or .pth file with one tensor [P, H]",
    _lacks_file(_ONE_TENSOR, _SAFE, *_PICKLED),
    _read_tensor,
    _write_tensor,
    reads_with_base=True,
    holds="file",
    loses=_BARE,
)
VLLM = Format(
    "vllm",
    "a .json file, the body of one request with prompt_embeds",
    _lacks_file(".json", ".json"),
    None,
    _write_vllm,
    writes_with_base=True,
    holds="file",
    loses=(*USED, *MEASURED, "template", "base_fingerprint"),
)
