"""The rungs of a sweep on Ray: each worker trains its share of the candidates side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

from softprompt.backbone import trust_code, trusts_code
from softprompt.cluster import cause_of, device_there, workers_of
from softprompt.errors import ProcessLostError, SoftPromptError
from softprompt.training import BaseLike, Snapshot, StopSignal, TuneSettings, prepare
from softprompt.training.sweeps.halving import Halving, Tried, unsaid


@final
class RungWorker:
    """Trains candidates on a base of its own."""

    def __init__(
        self, base_model: BaseLike, data: Any, first: TuneSettings, run: TuneSettings, trust: Callable[[], object]
    ) -> None:
        trust()
        device = device_there()
        if device is not None and run.device is None:
            first, run = replace(first, device=device), replace(run, device=device)
        with unsaid():
            self._first, self._run = prepare(base_model, data, first), run

    def ready(self) -> bool:
        """Return true, once everything is loaded."""
        return True

    def train(self, kept: Any, rung: int, until: int | None) -> Any:
        """Train candidates, given and returned as ``Halving.kept`` has them, to the end of a rung."""
        halving = Halving(self._first, self._run, None, StopSignal(), *kept)
        halving.train(list(halving.tried.values()), rung, until, "a rung")
        snapshots, record = halving.kept()
        return {name: each.to_cpu() for name, each in snapshots.items()}, record


@contextmanager
def rungs_on_ray(
    ray: Any, workers: int | None, most: int, check_stop: Callable[[], None], *given: Any
) -> Iterator[Callable[..., Iterator[Any]] | None]:
    """Yield what trains candidates to the end of a rung on the workers of a cluster; None without one.

    A worker is made of ``given``, by default ``most`` at most. Ray starts a lost one again, with its share.

    Raises:
        ConfigError: A worker cannot be made.
    """
    if ray is None:
        yield None
        return
    trust = trust_code if trusts_code() else bool
    with workers_of(ray, RungWorker, workers, *given, trust, most=most) as made:

        def train(going: Sequence[Tried], found: Mapping[str, Snapshot], rung: int, until: int | None) -> Any:
            running: dict[Any, list[str]] = {}
            for number, worker in enumerate(made[: len(going)]):
                share = {each.name: each.to_dict() for each in going[number :: len(made)]}
                snapshots = {name: found[name] for name in share if name in found}
                running[worker.train.remote((snapshots, {"candidates": share}), rung, until)] = list(share)
            while running:
                check_stop()
                for each in ray.wait(list(running), num_returns=1, timeout=1.0)[0]:
                    names = running.pop(each)
                    try:
                        yield ray.get(each)
                    except ray.exceptions.RayError as error:
                        if isinstance(own := getattr(error, "cause", None), SoftPromptError):
                            raise own from error
                        raise ProcessLostError(
                            f"candidate {', '.join(names)}: the worker was lost or failed: {cause_of(error)}"
                        ) from error

        yield train
