"""A base model with virtual tokens appended to its embedding table, and a head that avoids them.

A softmax over more ids than the base has needs the new ones to weigh nothing. With a bias that is
exact. Without one, each new id copies the head weights of the token that was least likely on
a probe: it is then as unlikely as that token, and a tie goes to the lower id, which is the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.backbone import (
    input_embedding,
    is_encoder_decoder,
    most_by_rounding,
    off_by,
    rounded,
    side_embeddings,
)
from softprompt.errors import ArtifactError

_PROBE_TOKENS = 16
_MASKED = -1.0e4
"""A logit whose share is 0 in every dtype, and which every dtype can hold."""


@dataclass(frozen=True, slots=True)
class Extension:
    """What was done to the base, and how exact it is.

    Attributes:
        vocabulary: Size of the new embedding table.
        head: How the new ids are kept from being generated: ``bias``, ``least likely row`` or ``tied``.
        extra_mass: Largest probability of all new ids together on the probe.
        rounding: Largest relative error of a stored value, from dtype and scale.
        difference: How far logits are off on the probe, against how far they lie apart (root mean squares).
    """

    vocabulary: int
    head: str
    extra_mass: float
    rounding: float
    difference: float


@torch.no_grad()
def extend(model: PreTrainedModel, tokens: Mapping[str, Tensor], ids: Mapping[str, list[int]]) -> Extension:
    """Append the virtual tokens of prompts to a model, in place, and check it against the original.

    Args:
        model: in evaluation mode.
        tokens: virtual tokens ``[P, H]`` by prompt.
        ids: their ids, by prompt.

    Raises:
        ArtifactError: the model does not support prompts as vocabulary.
    """
    table = input_embedding(model)
    if side_embeddings(model):
        raise ArtifactError(
            f"{type(model).__name__} has per-layer embedding tables, which prompts have no values for; "
            "use the prompts with softprompt"
        )
    old, scale = table.weight.shape[0], _scale(table)
    probe = torch.linspace(0, old - 1, _PROBE_TOKENS, device=table.weight.device).long()
    _check_range(tokens, table, scale)
    seen = {name: torch.cat([own.to(table(probe)), table(probe)]) for name, own in tokens.items()}
    before = {name: _logits(model, embeds=each) for name, each in seen.items()}
    with rounded(model):
        moved = {name: _logits(model, embeds=each) for name, each in seen.items()}
    head = _prepare_head(model)
    new = max(each for own in ids.values() for each in own) + 1
    _resize(model, new)
    table = input_embedding(model)
    table.weight[old:] = 0
    rounding = max(_fill(table, ids[name], own, scale) for name, own in tokens.items())
    _mask_head(model, head, old, least_likely(torch.cat(list(before.values()))))
    mass = difference = 0.0
    for name, own in ids.items():
        after = _logits(model, ids=torch.cat([torch.tensor(own).to(probe), probe]))
        difference = max(difference, _difference(after[:, :old], before[name], moved[name], name))
        mass = max(mass, float(after.softmax(-1)[:, old:].sum(-1).max()))
    return Extension(new, head, mass, rounding, difference)


def _fill(table: nn.Embedding, ids: list[int], tokens: Tensor, scale: float) -> float:
    """Write virtual tokens ``[P, H]`` at their ids and return the largest relative rounding error."""
    index = torch.tensor(ids, device=table.weight.device)
    table.weight[index] = (tokens.float() / scale).to(table.weight)
    lost = (table(index).float() - tokens.to(table.weight.device).float()).abs().max()
    return float(lost / tokens.abs().max())


def _check_range(tokens: Mapping[str, Tensor], table: nn.Embedding, scale: float) -> None:
    dtype = table.weight.dtype
    for name, own in tokens.items():
        if not bool(torch.isfinite((own.float() / scale).to(dtype)).all()):
            raise ArtifactError(
                f"the virtual tokens of {name} overflow {str(dtype).removeprefix('torch.')}, the base's "
                "dtype; pass torch_dtype (--torch-dtype) float32 or bfloat16"
            )


def _difference(after: Tensor, before: Tensor, moved: Tensor, name: str) -> float:
    """Return how far logits are off, relative to their spread; raises ArtifactError if rounding does less."""
    found, allowed = off_by(after, before), most_by_rounding(before, moved)
    # Not "greater than", which a NaN is never.
    if not found <= allowed:
        raise ArtifactError(
            f"the base with prompt {name} as vocabulary gives other logits than with the prompt in front "
            f"(relative difference {found:.2g}, rounding {allowed:.2g}); use --to vllm or tgis"
        )
    return found


def least_likely(logits: Tensor) -> int:
    """Return the id whose best chance over the positions of ``logits`` ``[N, V]`` is the smallest."""
    return int(logits.log_softmax(-1).max(0).values.argmin())


def _scale(table: nn.Embedding) -> float:
    """Return by what an embedding module scales its table, as Gemma's and BART's do; raises for anything else."""
    ids = torch.linspace(0, table.weight.shape[0] - 1, _PROBE_TOKENS).long().to(table.weight.device)
    seen, stored = table(ids).double(), table.weight[ids].double()
    eps = torch.finfo(table.weight.dtype).eps  # one rounding of the table, one of the product, and the estimate's
    scale = float((seen * stored).sum() / stored.square().sum())
    if seen.shape != stored.shape or not torch.allclose(seen, stored * scale, rtol=4 * eps, atol=0):
        raise ArtifactError(
            f"the embedding module {type(table).__name__} does more than look embeddings up and "
            "scale them, so it cannot hold prompts; use the prompts with softprompt"
        )
    declared = getattr(table, "embed_scale", None)
    # The declared factor, not the estimate: embeddings must be as exact as the dtype allows.
    return float(scale if declared is None else declared)


def _prepare_head(model: PreTrainedModel) -> str:
    """Untie the head where that is needed and safe, and return how new ids will be masked."""
    output = cast(Any, model).get_output_embeddings()
    if getattr(output, "bias", None) is not None or _logits_bias(model) is not None:
        return "bias"
    if not _tied(model):
        return "least likely row"
    # T5 scales its hidden states by whether the head is tied, so there it stays so.
    if is_encoder_decoder(model):
        return "tied"
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    return "least likely row"


def _resize(model: PreTrainedModel, new: int) -> None:
    """Resize embedding and head to ``new`` ids; an untied head stays untied."""
    output = cast(Any, model).get_output_embeddings()
    own = None if _tied(model) else output.weight.detach()
    model.resize_token_embeddings(new, mean_resizing=False)
    output = cast(Any, model).get_output_embeddings()
    if own is not None and _tied(model):
        # T5 1.1 has a head of its own under a config that says it is tied, and resizing obeys that.
        grown = own.new_zeros(new, own.shape[1])
        grown[: len(own)] = own
        output.weight = nn.Parameter(grown, requires_grad=False)


def _tied(model: PreTrainedModel) -> bool:
    weight = cast(Any, model).get_output_embeddings().weight
    table = cast(Any, model).get_input_embeddings().weight
    return weight is table or weight is input_embedding(model).weight


def _mask_head(model: PreTrainedModel, head: str, old: int, donor: int) -> None:
    output = cast(Any, model).get_output_embeddings()
    if head == "bias":
        bias = _logits_bias(model)
        target = output.bias if bias is None else bias[0]
        if not _tied(model):
            output.weight[old:] = output.weight[donor]
        target[old:] = _MASKED
    elif head == "least likely row":
        output.weight[old:] = output.weight[donor]


def _logits_bias(model: PreTrainedModel) -> Tensor | None:
    bias = getattr(model, "final_logits_bias", None)
    return bias if isinstance(bias, Tensor) else None


def _logits(model: PreTrainedModel, *, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
    """Return logits ``[N, V]`` of one row at each of its tokens (of the decoder's first, in seq2seq)."""
    given: dict[str, Any] = (
        {"input_ids": ids[None]} if ids is not None else {"inputs_embeds": cast(Tensor, embeds)[None]}
    )
    if is_encoder_decoder(model):
        config = model.config.get_text_config()
        start = config.decoder_start_token_id
        first = start if isinstance(start, int) else config.pad_token_id or 0
        given["decoder_input_ids"] = torch.tensor([[first, 0, 1, 2]], device=model.device)
    logits: Tensor = model(**given).logits[0]
    return logits.float()
