"""The processes that ``torchrun`` or another launcher started: who this one is, and what they tell each other.

A launcher says it in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Only work inside
``joined`` is shared out; elsewhere, and where there is no launcher, a process is a world of its own. All processes
go the same way and wait for each other where they add up or gather, so what one decides by must be the same in all.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, final

from softprompt.errors import ConfigError, ProcessLostError, SoftPromptError, first_line
from softprompt.progress import timed

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

_ROLL_CALL = 3.0
"""Seconds in which a process answers that is there."""


@final
@dataclass(frozen=True)
class World:
    """One process among ``size``, of which the first alone, rank 0, writes and speaks."""

    rank: int = 0
    size: int = 1
    _group: Any = None
    _store: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all processes into a tensor, in each of them the same bits."""
        if self.size > 1:
            from torch import distributed

            with self.together():
                distributed.all_reduce(tensor, group=None if tensor.is_cuda else self._group)

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any of the processes."""
        if self.size == 1:
            return flag
        import torch

        self.add_up(flags := torch.tensor([int(flag)]))
        return bool(flags.item())

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        with self.together():
            distributed.all_gather_object(found, value, group=self._group)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """Return, in all processes, what the first one makes; what it raises is raised in all."""
        if self.size == 1:
            return make()
        from torch import distributed

        found = [_attempted(make) if self.is_main else None]
        with self.together():
            distributed.broadcast_object_list(found, src=0, group=self._group)
        made: T = _outcome(found[0])
        return made

    def split(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """Return what ``work`` makes of each item, each process of every ``size``-th; an error is raised in all.

        Inside ``work`` a process is a world of its own.
        """
        if self.size == 1:
            return list(work(items))
        own, token = items[self.rank :: self.size], _current.set(_ALONE)
        try:
            attempted = _attempted(lambda: list(work(own)) if own else [])
        finally:
            _current.reset(token)
        found: list[Any] = [None] * len(items)
        for rank, part in enumerate(self.gather(attempted)):
            found[rank :: self.size] = _outcome(part)
        return found

    def speaks(self) -> bool:
        """Return whether this process says why it ends: the first one, or the first of those that are left."""
        ends = time.monotonic() + _ROLL_CALL
        while self.rank and self._store not in _unkept and time.monotonic() < ends:
            if any(self._told("failed", rank) for rank in range(self.rank)):
                return False
            time.sleep(0.05)
        return True

    @contextmanager
    def together(self) -> Iterator[None]:
        """Name the process that was lost where a collective of torch.distributed fails inside.

        Raises:
            ProcessLostError: One did; what else is raised inside is raised.
        """
        try:
            yield
        except RuntimeError as error:
            if not _of_collective(error):
                raise
            raise ProcessLostError(self._lost(error)) from error

    def _lost(self, error: RuntimeError) -> str:
        """Return which processes have ended, and why."""
        ends, missing = time.monotonic() + _ROLL_CALL, [rank for rank in range(self.size) if rank != self.rank]
        unknown = f"the processes lost each other ({first_line(error)})"
        if self._store is None:  # somebody else made the group, and keeps its store
            return unknown
        self._tell("here", "yes")
        while missing and self._is_kept and time.monotonic() < ends:
            missing = [rank for rank in missing if self._told("here", rank) is None]
            if any(self._told("failed", rank) for rank in missing):
                break
            time.sleep(0.05)
        known = {rank: self._told("failed", rank) for rank in missing}
        gone = [rank for rank in missing if known[rank] or not self._lives(rank)] or missing
        if not self._is_kept:  # what was sent last may still have found somebody to take it
            return f"rank 0 of {self.size} ended: without a word" if self.rank else unknown
        if not gone:
            return unknown
        return "; ".join(f"rank {rank} of {self.size} ended: {known[rank] or 'without a word'}" for rank in gone)

    def _lives(self, rank: int) -> bool:
        """Return whether a process may live: that of another machine may."""
        host, _, number = (self._told("at", rank) or "").rpartition(" ")
        if host != socket.gethostname():
            return bool(host)
        try:
            os.kill(int(number), 0)
        except OSError:
            return False
        return True

    @property
    def _is_kept(self) -> bool:
        """Whether somebody keeps the store still: rank 0 may, or the launcher."""
        return self._store is not None and self._store not in _unkept

    def _tell(self, what: str, text: str) -> None:
        """Leave word in the store, where somebody keeps it."""
        if self._is_kept:
            try:
                self._store.set(f"softprompt/{what}/{self.rank}", text)
            except RuntimeError:
                _unkept.append(self._store)  # torch prints a trace whenever it is asked again

    def _told(self, what: str, rank: int) -> str | None:
        key = f"softprompt/{what}/{rank}"
        if self._is_kept:
            try:
                return (self._store.get(key).decode() if self._store.check([key]) else "") or None
            except RuntimeError:
                _unkept.append(self._store)
        return None


_ALONE = World()
_current: ContextVar[World] = ContextVar("world", default=_ALONE)
_joined: list[World] = []
_unkept: list[Any] = []


def world() -> World:
    """Return the processes that share the work being done; one alone where nobody said otherwise."""
    return _current.get()


def launched() -> World:
    """Return what the launcher says this process is; see ``joined``."""
    if _joined:
        return _joined[0]
    try:
        return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (KeyError, ValueError):
        return World()


@contextmanager
def joined() -> Iterator[World]:
    """Share the work inside with the other processes of the launcher, if there is one; only the first one speaks.

    Raises:
        ConfigError: The launcher does not say where they meet, or who this one is, or they cannot meet there.
    """
    said = launched()
    if (said.rank, said.size) == (0, 1) or world().size > 1:
        yield world()
        return
    ranks, logger = meet(), logging.getLogger("softprompt")
    token, level = _current.set(ranks), logger.level
    for what in ("failed", "here"):
        ranks._tell(what, "")  # what was left of an earlier job
    if not ranks.is_main:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with timed(silent=not ranks.is_main):
            yield ranks
    except BaseException as error:
        ranks._tell("failed", str(error) or type(error).__name__)
        raise
    finally:
        logger.setLevel(level)
        _current.reset(token)


def meet() -> World:
    """Return this process among those of its launcher, joining them first or taking a group that is there.

    A process with a GPU takes that of its LOCAL_RANK.
    """
    if _joined:
        return _joined[0]
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, said = None, launched()
    if not distributed.is_initialized():
        if not 0 <= said.rank < said.size:  # the others would wait for the rank that it takes from them
            raise ConfigError(
                f"expected a RANK of at least 0 and below WORLD_SIZE, got RANK={said.rank} and "
                f"WORLD_SIZE={said.size}; start it with torchrun or accelerate launch, or unset both"
            )
        try:
            store, rank, size = next(rendezvous("env://"))
        except ValueError as error:
            raise ConfigError(
                f"RANK says that this is one of several processes, nothing says where they meet ({error}); start "
                "it with torchrun or accelerate launch, or unset RANK"
            ) from error
        except distributed.DistError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"rank {said.rank} of {said.size} cannot meet the others at {where} ({first_line(error)}); give "
                "all of them a MASTER_ADDR of rank 0 that they reach, and a MASTER_PORT that is free there"
            ) from error
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=size
        )
        atexit.register(_part)
    gloo = "gloo" in str(distributed.get_backend_config())
    group = None if gloo else distributed.new_group(backend="gloo")
    _joined.append(World(distributed.get_rank(), distributed.get_world_size(), group, store))
    _joined[0]._tell("at", f"{socket.gethostname()} {os.getpid()}")
    return _joined[0]


def _part() -> None:
    from torch import distributed

    ranks = next(iter(_joined), _ALONE)  # joining may have failed
    if distributed.is_initialized() and not any(ranks._told("failed", rank) for rank in range(ranks.size)):
        distributed.destroy_process_group()


def _of_collective(error: RuntimeError) -> bool:
    """Return whether an error is one of torch.distributed: NCCL's has a class, gloo's names its source file."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or re.search(r"/gloo/|pair closure", str(error)) is not None


def _attempted(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except (SoftPromptError, OSError) as error:
        return None, error


def _outcome(attempted: Any) -> Any:
    value, error = attempted
    if error is not None:
        raise error
    return value
