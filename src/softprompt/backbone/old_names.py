"""Former names of what ``Base.running`` composes, for the engine until it runs its passes by that."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel

from softprompt.backbone.base import Base
from softprompt.backbone.products import swapped_forwards

lent_bodies = swapped_forwards


def virtual_rows(
    model: PreTrainedModel, rows: Tensor | None, *, decoder: bool = False
) -> AbstractContextManager[None]:
    """Inject virtual tokens into a model for passes inside the context."""
    return Base.of(model).running(virtual_tokens=rows, decoder=decoder)
