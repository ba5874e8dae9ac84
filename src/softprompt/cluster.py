"""A Ray cluster: reaching it, and workers that hold a base there, which Ray starts again where they are lost."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

from softprompt.errors import ConfigError, UsageError
from softprompt.world import world

logger = logging.getLogger(__name__)

LOCAL = "local"
"""The address that starts Ray on this machine."""
RETRIES = 3
"""Times that a call which ended its worker is repeated."""


@contextmanager
def connected(address: str, workers: int | None = None, *, parts: str = "ray") -> Iterator[Any]:
    """Yield Ray, connected to the cluster at an address; an earlier connection stays, and what handles SIGTERM.

    ``parts`` is the module of Ray that is needed.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
        UsageError: A launcher started several of this process.
    """
    if world().size > 1:
        raise UsageError("--ray and torchrun both share the work out; start it without torchrun")
    try:
        import ray

        import_module(parts)
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'softprompt[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if own := {name: value for name, value in os.environ.items() if name.startswith("SOFTPROMPT_MAX_")}:
        how["runtime_env"] = {"env_vars": own}  # bounds of what is read, raised here
    if address == LOCAL:  # reading needs CPUs beside the workers'
        how |= {"num_cpus": (os.cpu_count() or 1) + (workers or 1), "include_dashboard": False}
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**how)
    except Exception as error:  # as which Ray says that its node has not started in time
        raise ConfigError(f"--ray {address}: {cause_of(error)}") from error
    if ends is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ends)
    try:
        with redirect_stdout(sys.stderr):  # Ray prints which worker has died among what a command answers
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def workers_of(
    ray: Any, kind: type, count: int | None, *given: Any, most: int = 1 << 16, beside: int = 0
) -> Iterator[list[Any]]:
    """Yield workers of a class with a method ``ready``, by default one for each GPU or else machine up to ``most``.

    Raises:
        ConfigError: One of them cannot be made, or there are fewer GPUs than the workers asked for.
    """
    gpus, cpus = (int(ray.cluster_resources().get(each, 0)) for each in ("GPU", "CPU"))
    if gpus and count and count > gpus:  # Ray would wait for the others without end
        raise ConfigError(f"--workers {count}: each takes a GPU, and the cluster has {gpus}; ask for fewer")
    made = ray.remote(num_gpus=1 if gpus else 0, num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(kind)
    wanted = count or min(gpus or len(ray.nodes()), most)
    if wanted + beside > cpus:  # what is beside them reads; a cluster may grow
        logger.warning("workers and reading need %d CPUs, Ray has %d and waits for more", wanted + beside, cpus)
    workers = [made.remote(*given) for _ in range(wanted)]
    try:
        ray.get([each.ready.remote() for each in workers])
    except ray.exceptions.RayError as error:
        raise ConfigError(f"a worker could not be loaded: {cause_of(error)}") from error
    try:
        yield workers
    finally:
        for each in workers:
            ray.kill(each)


def device_there() -> str | None:
    """Return the device of a worker: the GPU that Ray shows it, or None, the CPU."""
    ray = sys.modules.get("ray")  # in a worker that Ray started
    return "cuda:0" if ray and ray.get_gpu_ids() else None


def cause_of(error: Exception) -> str:
    """Return the last line of an error of Ray, which is the worker's own."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]
