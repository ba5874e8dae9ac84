"""The loss of a forward call whose prompt is a context with labels of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softprompt.engine import Layout
from softprompt.errors import ConfigError
from softprompt.prompts import CPTConfig, PromptLearningConfig, cpt_columns, cpt_loss

TYPES = "input_type_mask"
"""Argument of PEFT's forward: what each token of the text is."""


@dataclass(frozen=True, slots=True)
class ContextLabels:
    """Labels ``[B, T]`` and token types ``[B, T]`` of a call, kept from the base, whose loss is another."""

    config: CPTConfig
    labels: Tensor
    types: Tensor | None

    def scored(self, outputs: Any, layout: Layout | None) -> Any:
        """Return the base's outputs with the loss of context and text.

        Raises:
            ConfigError: If the context is not among the call's columns.
        """
        if layout is None:
            raise ConfigError(
                "labels of a context-aware prompt need the whole row, this call goes on from a cache; "
                "leave past_key_values or labels out"
            )
        labels, types = cpt_columns(
            self.config, self.labels, self.types, context=layout.slot, text=layout.text
        )
        if isinstance(outputs, tuple):
            return (cpt_loss(outputs[0], labels, types, self.config), *outputs)
        loss = cpt_loss(outputs.logits, labels, types, self.config)
        return dataclasses.replace(outputs, loss=loss)


def without_context_labels(
    inputs: dict[str, Any], names: Sequence[str], configs: Mapping[str, PromptLearningConfig]
) -> tuple[dict[str, Any], ContextLabels | None]:
    """Return a call's arguments for the base, and the labels that go into the context's loss instead.

    Args:
        inputs: The arguments.
        names: The prompt of each row.
        configs: Configurations by name.

    Raises:
        ConfigError: If rows with labels have different prompts, one of them a context.
    """
    contexts = {name: config for name, config in configs.items() if isinstance(config, CPTConfig)}
    if not contexts:
        return inputs, None
    inputs = dict(inputs)
    types, labels = inputs.pop(TYPES, None), inputs.get("labels")
    used = set(names)
    if labels is None or not used & contexts.keys():
        return inputs, None
    if len(used) > 1:
        raise ConfigError(
            f"labels with context-aware prompts need one prompt for the batch, got {', '.join(sorted(used))}; "
            "split the batch"
        )
    del inputs["labels"]
    return inputs, ContextLabels(contexts[used.pop()], labels, types)
