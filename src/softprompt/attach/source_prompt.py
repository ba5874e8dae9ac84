"""Reading the source prompt that a multitask prompt starts from."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softprompt.artifacts import load_pickled
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import PROMPT_KEY, SOURCE_INITS, MultitaskPromptTuningConfig, SourcePrompt


def source_of(config: MultitaskPromptTuningConfig) -> SourcePrompt | None:
    """Return the source prompt a configuration names; None where it starts without one.

    Raises:
        ConfigError: If the file is missing, damaged, holds code, or is no prompt.
    """
    if config.inference_mode or config.prompt_tuning_init not in SOURCE_INITS:
        return None
    path = Path(str(config.prompt_tuning_init_state_dict_path))
    if not path.is_file():
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path must be a weights file such as adapter_model.safetensors, "
            f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the file of the source prompt"
        )
    return SourcePrompt.of(_tensors(path), str(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else load_pickled(path)
    except (ArtifactError, SafetensorError, OSError) as cause:
        raise ConfigError(
            f"the source prompt {path} cannot be read, it is damaged or holds more than tensors; "
            f"save it again as .safetensors from a "
            "source you trust"
        ) from cause
    if isinstance(loaded, Tensor):
        # caikit's encoder.pt: the rows and nothing else.
        return {PROMPT_KEY: loaded.detach()}
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ConfigError(
            f"the source prompt {path} must hold a dict of named tensors; save it again with save_pretrained"
        )
    return {str(name): value.detach() for name, value in loaded.items()}
