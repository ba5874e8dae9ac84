"""A stand-in for Ray in this process, whose calls end in any order, and some of them with their worker."""

from __future__ import annotations

import contextvars
import pickle
import random
import sys
import types
from functools import partial


class StandIn(types.ModuleType):
    """What the driver uses of Ray: actors in this process, whose calls end in any order."""

    def __init__(self, lost=(), gpus=0):
        super().__init__("ray")
        self.lost, self.waiting, self.killed, self.calls = set(lost), {}, 0, 0
        self.random, self.gpus, self.made = random.Random(1), gpus, 0
        self.exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))
        self.data = types.ModuleType("ray.data")
        self.data.datasource = types.SimpleNamespace(FileBasedDatasource=Files)
        self.data.read_datasource = lambda files: types.SimpleNamespace(iter_batches=partial(self.batches, files))
        context = types.SimpleNamespace(execution_options=types.SimpleNamespace(preserve_order=False))
        self.data.DataContext = types.SimpleNamespace(get_current=lambda: context)

    is_initialized = staticmethod(lambda: True)
    nodes = staticmethod(lambda: [{}])
    get_gpu_ids = staticmethod(list)

    def cluster_resources(self):
        return {"CPU": 2.0, "GPU": float(self.gpus)} if self.gpus else {"CPU": 2.0}

    def remote(self, **options):
        assert options["max_restarts"] == -1

        def made(owner, given):
            self.made += 1
            return Actor(self, contextvars.Context().run(owner, *sent(given)))  # of the context nothing comes along

        return lambda owner: types.SimpleNamespace(remote=lambda *given: made(owner, given))

    def wait(self, refs, num_returns, timeout=None):
        assert len(refs) <= 4  # two for each worker
        done = self.random.choice(refs)
        return [done], [each for each in refs if each is not done]

    def get(self, ref):
        return [self.get(each) for each in ref] if isinstance(ref, list) else ref()

    def kill(self, actor):
        self.killed += 1

    def batches(self, files, batch_size, batch_format):
        from pyarrow import concat_tables

        assert batch_format == "pyarrow"
        try:
            blocks = list(files.blocks())
        except Exception as error:
            raise self.exceptions.RayError(f"ray::Read\n{type(error).__name__}: {error}") from error
        table = concat_tables(blocks) if blocks else None
        for start in range(0, table.num_rows if blocks else 0, batch_size):
            yield table.slice(start, batch_size)


class Files:
    """What reads files for Ray Data, which calls two methods of it."""

    def __init__(self, paths):
        self.paths = paths

    def blocks(self):
        from pyarrow.fs import LocalFileSystem

        for path in self.paths:
            with self._open_input_source(LocalFileSystem(), path, buffer_size=None) as file:
                yield from self._read_stream(file, path)


def sent(given):
    """What comes to another process."""
    return pickle.loads(pickle.dumps(given))  # noqa: S301


class Actor:
    def __init__(self, ray, worker):
        self.ray, self.worker = ray, worker

    def __getattr__(self, name):
        def remote(*given):
            def call():
                if name in ("answer", "train"):
                    self.ray.calls += 1
                    if given[1] in self.ray.lost:
                        raise self.ray.exceptions.RayError("The actor died: out of memory")
                try:
                    return sent(getattr(self.worker, name)(*sent(given)))
                except Exception as error:
                    raised = self.ray.exceptions.RayError(f"ray::{name}\n{error}")
                    raised.cause = error
                    raise raised from error

            return call

        return types.SimpleNamespace(remote=remote)


def in_place_of_ray(patch, **options):
    """Put a stand-in where Ray would be imported from, and return it."""
    ray = StandIn(**options)
    patch.setitem(sys.modules, "ray", ray)
    patch.setitem(sys.modules, "ray.data", ray.data)
    return ray
