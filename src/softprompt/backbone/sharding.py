"""A frozen base that is larger than one device, spread over the processes of torch.distributed.

``fsdp`` shards the weights of every layer over the processes (FSDP2, ``fully_shard``; Zhao et al. 2023,
arXiv:2304.11277): a layer is gathered when it runs and let go afterwards, so each process needs the memory of its
share and of two layers, and works on rows of its own. ``tp`` splits the products inside each layer by transformers'
plan (Shoeybi et al. 2019, arXiv:1909.08053): all processes work on the same rows. Either way every process must
run the same passes in the same order, or all of them wait for ever.

Embedding tables, the head and what else stands outside the layers stay whole in every process: prompts start from
embeddings, virtual tokens stand beside them, and fingerprints sample them, all outside a pass, where a sharded
table has no values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedConfig, PreTrainedModel

from softprompt.errors import BackboneError, ConfigError
from softprompt.world import World, launched, meet, world

SHARDS = ("fsdp", "tp")


def shard_of(model: nn.Module) -> str:
    """Return how a model is spread over processes, one of ``SHARDS``; empty where each process has all of it."""
    if any(getattr(part, "_is_fsdp_managed_module", False) for part in model.modules()):
        return "fsdp"
    return "tp" if (getattr(model, "_tp_size", None) or 1) > 1 else ""


def split_of(model: nn.Module) -> World:
    """Return the processes that rows can be shared out to: one alone where all of them must run the same passes."""
    return World() if shard_of(model) else world()


def passes_together(model: nn.Module) -> AbstractContextManager[None]:
    """Return the context of a pass or its backward; in those of a sharded model a process that is lost is named."""
    alone = not (distributed.is_available() and distributed.is_initialized() and shard_of(model))
    return nullcontext() if alone else launched().together()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its values; of a sharded one they are gathered, by all processes together."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: all of it, or its shard."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def require_readable(model: nn.Module, table: Tensor) -> None:
    """Refuse a model whose embedding table has no values outside a pass.

    Raises:
        BackboneError: DeepSpeed has partitioned it, or somebody has sharded it.
    """
    if hasattr(table, "ds_id"):
        raise BackboneError(
            f"{type(model).__name__} is partitioned by DeepSpeed ZeRO-3, whose weights have values inside its own "
            "engine's passes only, and prompts need the embeddings outside; use ZeRO stage 2 or less, or load the "
            "base with shard='fsdp' (--shard fsdp), which spreads it as far"
        )
    if hasattr(table, "full_tensor"):
        raise BackboneError(
            f"{type(model).__name__} has a sharded embedding table, and prompts need its values outside a pass; "
            "load the base with shard='fsdp' (--shard fsdp), which leaves it whole"
        )


def device_of_process(shard: str) -> torch.device:
    """Return the device of this process, joining the processes of its launcher where nobody has yet.

    Raises:
        ConfigError: There is no such way, or this process was not started with others.
    """
    if shard not in SHARDS:
        raise ConfigError(f"shard must be one of {', '.join(SHARDS)}, got {shard!r}")
    if not distributed.is_initialized() and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"shard {shard} spreads the base over processes, and this is one alone; start it with "
            "torchrun --nproc-per-node N -m softprompt ..., or leave shard out"
        )
    meet()
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def reading(shard: str, loader: Any, config: PreTrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told so that no process reads more than it needs.

    For ``fsdp`` the first process reads the files into the memory of its CPU and hands them on. ``options`` are
    those of transformers, which say whether code that comes with the base may run.

    Raises:
        BackboneError: The base is stored quantised, or cannot be split among so many processes.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise BackboneError("a quantised base cannot be sharded, its scales are no weights; load it in bfloat16")
    if shard == "fsdp":
        return {"device_map": "meta"} if distributed.get_rank() else {}
    count, text = distributed.get_world_size(), config.get_text_config()
    trust_remote_code = bool(options.get("trust_remote_code"))
    with torch.device("meta"):
        twin = loader.from_config(config, trust_remote_code=trust_remote_code)
    if not twin.supports_tp_plan:
        raise BackboneError(f"{type(twin).__name__} has no plan for tensor parallelism; use shard='fsdp'")
    heads = [getattr(text, name, None) or count for name in ("num_attention_heads", "num_key_value_heads")]
    if any(number % count for number in heads):
        raise BackboneError(f"{heads[0]} heads ({heads[1]} of keys) do not split into {count} processes; use fewer")
    from transformers.distributed.configuration_utils import DistributedConfig

    names = {module: name for name, module in twin.named_modules()}
    kept = {names[part] for part in (twin.get_input_embeddings(), twin.get_output_embeddings()) if part in names}
    plan = dict.fromkeys(kept & twin.tp_plan.keys(), "replicate")
    return {"distributed_config": DistributedConfig(tp_size=count, tp_plan=plan)}


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Freeze a model and shard its layers in place over all processes (FSDP2), with the first one's values.

    Layers are handed on and sharded one by one. The model of another process may be without values ("meta").
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    stacks, mesh = _stacks(model), init_device_mesh(device.type, (distributed.get_world_size(),))
    inside = {part for layers in stacks.values() for layer in layers for part in layer.modules()}
    model.requires_grad_(False)
    _hand_on([part for part in model.modules() if part not in inside], device, model)
    for stack, layers in stacks.items():
        for layer in layers:
            _hand_on(list(layer.modules()), device)
            fully_shard(layer, mesh=mesh, ignored_params=_kept_whole(layer))
        # The outermost module that runs orders the gathering of all inside it.
        own = {weight for layer in layers for weight in layer.parameters()}
        fully_shard(stack, mesh=mesh, ignored_params={each for each in stack.parameters() if each not in own})


def _stacks(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Return the modules that run layers, each with its layers; an encoder and a decoder are two."""
    found: dict[nn.Module, list[nn.Module]] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        for child in () if module in inside else module.children():
            if isinstance(child, nn.ModuleList) and next(child.parameters(), None) is not None:
                found.setdefault(module, []).extend(child)
                inside.update(child.modules())
    return found


def _kept_whole(layer: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a layer that are read outside its passes (T5's position bias), or are one number."""
    return {
        weight
        for part in layer.modules()
        for weight in part.parameters(recurse=False)
        if isinstance(part, nn.Embedding) or not weight.dim()
    }


def _hand_on(parts: list[nn.Module], device: torch.device, tied: PreTrainedModel | None = None) -> None:
    """Give parameters and buffers of modules the first process's values, on a device; ``tied`` owns shared ones."""
    for part in parts:
        if any(each.is_meta for each in chain(part.parameters(recurse=False), part.buffers(recurse=False))):
            part.to_empty(device=device, recurse=False)
        else:
            cast(Any, part)._apply(lambda each: each.to(device), recurse=False)
    if tied is not None:
        tied.tie_weights()
    tensors = (chain(part.parameters(recurse=False), part.buffers(recurse=False)) for part in parts)
    with launched().together():
        for tensor in dict.fromkeys(chain.from_iterable(tensors)):
            distributed.broadcast(tensor.detach(), 0)
