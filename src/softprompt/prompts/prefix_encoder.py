"""The trainable module of prefix tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from softprompt.errors import ArtifactError, ConfigError
from softprompt.prompts.kinds import TaskType
from softprompt.prompts.module import PROMPT_KEY, PromptModule, check_task, take_over
from softprompt.prompts.prefix import PrefixTuningConfig
from softprompt.prompts.randomness import drawing_from


@final
class PrefixEncoder(PromptModule):
    """Keys and values of every layer for P virtual tokens (Li and Liang 2021).

    Trained directly they are ``embedding.weight``, float32 ``[P, L·2·A_kv·D]`` in PEFT's order; with a
    projection they are ``transform(embedding.weight)`` of rows ``[P, A_kv·D]``. A file holds them
    baked, so what is loaded is always direct.
    """

    kind: ClassVar[Literal["rows", "kv"]] = "kv"
    first: Tensor | None
    """Row of the frozen first token ``[1, L·2·A_kv·D]``."""

    def __init__(
        self,
        config: PrefixTuningConfig,
        *,
        text: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create and initialise the prefix.

        Args:
            config: What to create; its length and sizes are needed.
            text: Keys and values of the initial text, ``[L, 2, A_kv, P, D]``.
            generator: Source of randomness; None is torch's global one, as in PEFT.

        Raises:
            ConfigError: If the config lacks a size, or the text's values have another shape.
        """
        super().__init__()
        length, layers, heads, width = _sizes(config)
        self._shape = (layers, 2, heads, length, width // heads)
        self._spread = config.task_type == TaskType.SEQ_2_SEQ_LM
        flat = 2 * layers * width
        self.transform: nn.Sequential | None = None
        self.register_buffer("first", None)
        with drawing_from(generator):
            if config.prefix_projection and not config.inference_mode:
                hidden = config.encoder_hidden_size or width
                self.embedding = nn.Embedding(length, width, dtype=torch.float32)
                self.transform = nn.Sequential(
                    nn.Linear(width, hidden, dtype=torch.float32),
                    nn.Tanh(),
                    nn.Linear(hidden, flat, dtype=torch.float32),
                )
            else:
                self.embedding = nn.Embedding(length, flat, dtype=torch.float32)
        self._initialise(config, text)

    @torch.no_grad()
    def _initialise(self, config: PrefixTuningConfig, text: Tensor | None) -> None:
        if config.init_weights == "zero" and not config.inference_mode:
            zeroed = self.embedding if self.transform is None else self.transform[-1]
            for parameter in zeroed.parameters():
                parameter.zero_()
        if text is not None:
            if tuple(text.shape) != self._shape:
                raise ConfigError(
                    f"the text's keys and values must be {list(self._shape)}, got {list(text.shape)}; "
                    "leave num_layers, num_attention_heads and token_dim out"
                )
            self.embedding.weight.copy_(self._flat(text.float()))
        if config.freeze_first_token:
            self.first = self.embedding.weight[:1].clone()

    def materialize(self, task: int = 0) -> Tensor:
        """Return keys and values ``[L, 2, A_kv, P, D]``; see ``PromptModule``."""
        check_task(task, self.num_tasks)
        layers, _, heads, length, width = self._shape
        return self._rows().view(length, layers, 2, heads, width).permute(1, 2, 3, 0, 4)

    def _rows(self) -> Tensor:
        rows: Tensor = self.embedding.weight
        if self.transform is not None:
            rows = self.transform(rows)
        return rows if self.first is None else torch.cat([self.first, rows[1:]])

    def _flat(self, values: Tensor) -> Tensor:
        return values.permute(3, 0, 1, 2, 4).reshape(self._shape[3], -1)

    def stored(self) -> dict[str, Tensor]:
        """Return what a file holds, ``[P, L·2·A_kv·D]``; see ``PromptModule``.

        For seq2seq every layer is followed by an empty one, ``[P, 2·L·2·A_kv·D]``: PEFT hands the
        decoder's layer l the keys and values of layer 2 l (its number of layers taken round).
        """
        rows = self._rows().detach().cpu().float().clone()
        if self._spread:
            layers = rows.view(self._shape[3], self._shape[0], 1, -1)
            rows = torch.cat([layers, torch.zeros_like(layers)], dim=2).flatten(1)
        return {PROMPT_KEY: rows}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored keys and values; see ``PromptModule``.

        Raises:
            ArtifactError: Also for a projection, whose parameters the values do not tell.
        """
        if self.transform is not None:
            raise ArtifactError(
                "saved keys and values do not tell the parameters of prefix_projection; attach the prompt "
                "with inference_mode=True, or train them directly"
            )
        given = dict(tensors)
        layers, _, heads, length, width = self._shape
        flat = 2 * heads * width
        rows = given.get(PROMPT_KEY)
        if self._spread and rows is not None and rows.dim() == 2 and len(rows) == length:
            found = rows.shape[1] // flat
            if rows.shape[1] % flat == 0 and found in (layers, 2 * layers):
                slots = torch.arange(layers, device=rows.device) * 2 % found
                given[PROMPT_KEY] = rows.view(length, found, flat)[:, slots].flatten(1)
        take_over({PROMPT_KEY: self.embedding.weight}, given)
        if self.first is not None:
            self.first = self.embedding.weight.detach()[:1].clone()


def _sizes(config: PrefixTuningConfig) -> tuple[int, int, int, int]:
    """Return P, L, A_kv and A_kv · D."""
    found = []
    for name in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"):
        value = getattr(config, name)
        if value is None:
            raise ConfigError(f"{name} is missing; a prefix needs it before it is made")
        found.append(int(value))
    length, layers, heads, width = found
    if width % heads:
        raise ConfigError(
            f"token_dim {width} is not a multiple of num_attention_heads {heads}; leave both out"
        )
    return length, layers, heads, width
