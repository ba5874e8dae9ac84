"""Modules trained with a prompt (PEFT's ``modules_to_save``), such as a language-model head, as files hold them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from softprompt.artifacts import StoredPrompt
from softprompt.backbone import Base
from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts import PromptLearningConfig, check_fit, take_over

HEAD = "base_model."
"""What PEFT puts before the path of a head's parameter."""


def loaded_heads(
    stored: StoredPrompt, config: PromptLearningConfig, base: Base
) -> dict[str, nn.Module]:
    """Return the trained modules of a stored prompt in float32, by the path of the module they replace.

    Raises:
        ArtifactError: A value is missing, left over, or of another shape.
        ConfigError: The base has no module of a name in ``modules_to_save``.
    """
    heads = {}
    for name in config.modules_to_save or []:
        paths = [path for path, _ in base.model.named_modules() if path.rpartition(".")[2] == name]
        if not paths:
            raise ConfigError(
                f"modules_to_save names {name!r}, but {base.facts.architecture} has no such module; "
                "see model.named_modules()"
            )
        heads |= {path: copy.deepcopy(base.model.get_submodule(path)).float() for path in paths}
    own = head_tensors(heads)
    given = {name: value for name, value in stored.tensors.items() if name.startswith(HEAD)}
    left = sorted(given.keys() - own.keys())
    if left:
        raise ArtifactError(
            f"{stored.location} holds {', '.join(left)}, which this model has no module for; "
            "name the module in modules_to_save"
        )
    check_fit(own, given)
    take_over(own, given)
    for head in heads.values():
        head.requires_grad_(False)
    return heads


def head_tensors(heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the values of trained heads under PEFT's names, sharing their memory."""
    return {
        f"{HEAD}{path}.{name}": value.detach()
        for path, head in heads.items()
        for name, value in head.state_dict().items()
    }
