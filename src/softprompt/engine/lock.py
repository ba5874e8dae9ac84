"""One pass at a time through a base model.

A pass with prompts changes things the whole process shares: the rows behind the input
embedding, the attention implementation, hooks on layers. Each model therefore has one
re-entrant lock, and every pass of ours holds it; with one lock there is no order to get wrong.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.backbone import input_embedding

# Kept beside the models, never on them: a lock can be neither copied nor pickled.
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_guard = threading.Lock()


def locked(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Return the lock of a model, for ``with``; a task model and its parts share one.

    While torch.compile traces there is none: a lock cannot be part of a graph.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    with _guard:
        lock: AbstractContextManager[Any] = _locks.setdefault(
            input_embedding(model), threading.RLock()
        )
    return lock
