"""Every format that a prompt is read from or written to, as one table.

A new format is a module with a ``Format`` and a line of the table. Order matters: the first that
fits a source is its format.
"""

from __future__ import annotations

from pathlib import Path

from softprompt.artifacts.formats.caikit import CAIKIT
from softprompt.artifacts.formats.extended_vocabulary import EXTENDED_VOCABULARY, PROMPTS_FILE
from softprompt.artifacts.formats.format import PEFT, SOFTPROMPT, Ask, Export, Format, Read
from softprompt.artifacts.formats.prompt_cache import MLX_LM
from softprompt.artifacts.formats.tensor_files import NPY, TENSOR, TGIS, VLLM
from softprompt.errors import ArtifactError, ConfigError, nearest

__all__ = ["FORMATS", "PROMPTS_FILE", "Ask", "Export", "Format", "Read", "detect", "format_named"]

FORMATS: tuple[Format, ...] = (SOFTPROMPT, PEFT, CAIKIT, TGIS, NPY, MLX_LM, TENSOR, EXTENDED_VOCABULARY, VLLM)


def format_named(name: str) -> Format:
    """Return a format that can be written.

    Raises:
        ConfigError: there is none of this name.
    """
    known = {each.name: each for each in FORMATS if each.write is not None}
    if name not in known:
        raise ConfigError(f"no format {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


def detect(source: str | Path) -> Format:
    """Return the format of a path; a name that is not a path is the hub id of a PEFT folder.

    Raises:
        ArtifactError: it fits none; the message names each format with what is missing.
    """
    path = Path(source)
    if not path.exists():
        return PEFT
    tried = []
    for each in FORMATS:
        missing = each.lacks(path)
        if missing is None:
            return each
        tried.append(f"{each.name}: {missing}")
    raise ArtifactError(
        f"{source} is in no format known here ({'; '.join(tried)}); check the path, or save the "
        "virtual tokens as one tensor in .safetensors"
    )
