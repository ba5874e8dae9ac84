"""A saved prompt as what a base is given, without being attached to it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from softprompt.artifacts import StoredPrompt, check_base, started_prompt, tensors_read
from softprompt.backbone import Base
from softprompt.engine import completed
from softprompt.errors import ArtifactError
from softprompt.prompts import Prompt, PromptLearningConfig


@torch.no_grad()
def detached_prompts(
    stored: StoredPrompt, model: PreTrainedModel, *, ignore_fingerprint: bool = False
) -> tuple[PromptLearningConfig, tuple[Prompt, ...]]:
    """Return the completed configuration of a saved prompt and the prompt of each of its tasks.

    The base is read and not changed, so this may run while another thread uses it.

    Args:
        stored: What was read from disk.
        model: The base it is for.
        ignore_fingerprint: Take a prompt that was made for another base.

    Raises:
        ArtifactError: If the tensors do not fit, or the prompt holds trained heads.
        ConfigError: If the configuration does not fit the base.
        FingerprintError: If the base is another one.
    """
    heads = sorted(name for name in stored.tensors if name.startswith("base_model."))
    if heads:
        raise ArtifactError(
            f"{stored.location} holds trained modules ({', '.join(heads[:3])}), which cannot stand beside "
            "other prompts; attach it with PeftModel.from_pretrained"
        )
    check_base(stored, model, ignore=ignore_fingerprint)
    base = Base.of(model)
    config = completed(stored.configuration(), base)
    module = started_prompt(config, model)
    module.load_stored(tensors_read(stored.tensors, config, seq2seq=base.is_encoder_decoder))
    return config, tuple(module.prompt(task).detach() for task in range(module.num_tasks))
