"""Modules trained with a prompt (PEFT's ``modules_to_save``), such as a language-model head, as files hold them."""

from __future__ import annotations

import copy

from torch import nn

from softprompt.artifacts import StoredPrompt
from softprompt.backbone import HEAD, Base, head_tensors, modules_named
from softprompt.errors import ArtifactError
from softprompt.prompts import PromptLearningConfig, check_fit, take_over


def loaded_heads(
    stored: StoredPrompt, config: PromptLearningConfig, base: Base
) -> dict[str, nn.Module]:
    """Return the trained modules of a stored prompt in float32, by the path of the module they replace.

    Raises:
        ArtifactError: A value is missing, left over, or of another shape.
        ConfigError: The base has no module of a name in ``modules_to_save``.
    """
    paths = modules_named(base.model, config.modules_to_save or [])
    heads = {path: copy.deepcopy(base.model.get_submodule(path)).float() for path in paths}
    own = head_tensors(heads)
    given = {name: value for name, value in stored.tensors.items() if name.startswith(HEAD)}
    left = sorted(given.keys() - own.keys())
    if left:
        raise ArtifactError(
            f"{stored.location} holds trained modules ({', '.join(left[:3])}) that modules_to_save does not "
            "name; name them there"
        )
    check_fit(own, given)
    take_over(own, given)
    for head in heads.values():
        head.requires_grad_(False)
    return heads
