"""Bases that are no models of transformers: any module with embeddings, as PEFT takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast, final

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from softprompt.errors import ConfigError
from softprompt.prompts import PeftConfig, PromptLearningConfig


@final
class PlainModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A module under the interface of transformers' models; both have the very same parts and parameters.

    What transformers' models have and the module does not is the default: no generation, no name, no fingerprint.
    """

    def __init__(self, module: nn.Module, config: PreTrainedConfig) -> None:
        vars(self)["module"] = module  # beside the modules, whose names are those of its own parts
        super().__init__(config)
        for parts in ("_modules", "_parameters", "_buffers"):
            vars(self)[parts] = vars(module)[parts]

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The module's own call, with its signature."""
        module = vars(self)["module"]
        return functools.wraps(module.forward)(functools.partial(module))

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return cast(bool, vars(self)["module"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        vars(self)["module"].training = mode

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of the vocabulary, without rows where there is none: a prefix needs none."""
        own = getattr(vars(self)["module"], "get_input_embeddings", None)
        if own is not None:
            return cast(nn.Module, own())
        tables = [each for each in self.modules() if isinstance(each, nn.Embedding)]
        sized = [each for each in tables if len(each.weight) == getattr(self.config, "vocab_size", None)]
        empty = vars(self).setdefault("_no_table", nn.Embedding(0, 0))
        return next(iter(sized or tables), cast(nn.Module, empty))

    def __getattr__(self, name: str) -> Any:
        """Look up what transformers' models lack on the module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["module"], name)


def as_pretrained(model: nn.Module, config: PeftConfig) -> PreTrainedModel:
    """Return a model of transformers as it is, and any other module under its interface.

    Sizes that the module's configuration does not say are the prompt's.

    Raises:
        ConfigError: If it is no module, or has no table that virtual tokens could stand in.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a model, a torch.nn.Module, got a {type(model).__name__}")
    plain = PlainModel(model, _config_of(model, config))
    key_values = isinstance(config, PromptLearningConfig) and config.keys_and_values
    if not key_values and not len(cast(nn.Embedding, plain.get_input_embeddings()).weight):
        raise ConfigError(
            f"{type(model).__name__} has no torch.nn.Embedding and no get_input_embeddings(), so no prompt can "
            "stand before its input; give it one of them"
        )
    return plain


def original(model: PreTrainedModel) -> Any:
    """Return the module that stands behind a base, as its user knows it."""
    return vars(model).get("module", model) if isinstance(model, PlainModel) else model


def _config_of(model: nn.Module, prompt: PeftConfig) -> PreTrainedConfig:
    given = getattr(model, "config", None)
    values: dict[str, Any] = dict(vars(given)) if hasattr(given, "__dict__") else {}
    if isinstance(given, Mapping):
        values |= given
    layers, heads, width = (getattr(prompt, n, None) for n in ("num_layers", "num_attention_heads", "token_dim"))
    known: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    known |= {"num_hidden_layers": layers or 1, "num_attention_heads": heads or 1, "hidden_size": width or 1}
    known |= {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
    return PreTrainedConfig(**known)
