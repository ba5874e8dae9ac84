"""The processes of a launcher, over gloo on the CPU: what each of them returns."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import distributed


def run_together(work, folder, *args, count=2):
    """Run ``work(*args)`` in ``count`` processes of one group and return what each returns, in the order of ranks.

    A process that raises ends the others, and its traceback is raised here.
    """
    torch.multiprocessing.spawn(_begin, (count, str(folder), work, args), nprocs=count)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(count)]


def _begin(rank, count, folder, work, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    wait = timedelta(seconds=120)
    distributed.init_process_group("gloo", f"file://{folder}/group", wait, world_size=count, rank=rank)
    try:
        torch.save(work(*args), f"{folder}/{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
