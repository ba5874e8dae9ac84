"""Which prompt each row of a batch gets, lent to the base for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from softprompt.attach import heads
from softprompt.attach.heads import BASE
from softprompt.backbone.facts import input_embedding
from softprompt.engine.layout import Prompts
from softprompt.engine.lock import locked
from softprompt.engine.recomputed import recomputed_alike
from softprompt.engine.virtual import VirtualVocabulary
from softprompt.errors import AdapterError, ConfigError


def row_names(names: Sequence[str] | None, active: str, batch: int) -> list[str]:
    """Return one name a row: the caller's, or the active prompt's for all.

    Raises:
        AdapterError: If there is not one name a row.
    """
    if names is None:
        return [active] * batch
    if len(names) != batch:
        raise AdapterError(
            f"adapter_names must hold one name a row: {batch} rows, got {len(names)} names"
        )
    return list(names)


@contextmanager
def lent(
    model: PreTrainedModel,
    vocabulary: VirtualVocabulary,
    rows: Sequence[str],
    value_of: Callable[[str], Tensor],
    sees_input: bool,
) -> Iterator[Prompts | None]:
    """Lend the rows' prompts to the embedding and switch the heads; None when no row has one.

    The context holds the model's lock: threads take turns.

    Args:
        model: The base, whose heads are switched.
        vocabulary: The hook on its embedding.
        rows: The name of each row's prompt, ``__base__`` for none.
        value_of: Gives the rows ``[P, H]`` of a named prompt.
        sees_input: Whether an encoder's prompts attend to the input.

    Raises:
        ConfigError: If the embedding table was resized since the prompts were attached.
    """
    size = input_embedding(model).weight.shape[0]
    if size != vocabulary.size:
        raise ConfigError(
            f"the embedding table had {vocabulary.size:,} rows when the prompts were attached, now it has "
            f"{size:,}; resize it first, then attach"
        )
    distinct = [name for name in dict.fromkeys(rows) if name != BASE]
    prompts = Prompts.of(
        [value_of(name) for name in distinct],
        [-1 if name == BASE else distinct.index(name) for name in rows],
        sees_input,
    )
    with locked(model), recomputed_alike(model):
        switches = [switch for _, switch in heads.switches_of(model)]
        for switch in switches:
            switch.active = rows[0] if len(set(rows)) == 1 else tuple(rows)
        try:
            with vocabulary.lend(prompts.table if distinct else None):
                yield prompts if distinct else None
        finally:
            for switch in switches:
                switch.active = None
