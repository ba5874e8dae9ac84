"""The processes of a launcher: a script run once for each rank, as ``torchrun`` starts it, over gloo on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

import pytest
import torch


def run_ranks(script, *words, count=2, seconds=300):
    """Run ``script`` with words as ``sys.argv[1:]`` in processes; return (code, stdout, stderr) by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    meet["PYTHONPATH"] = os.pathsep.join(sys.path)
    with ExitStack() as stack:  # files, since a pipe that nobody empties stops who writes
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in range(count)]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, words)],
                env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=out,
                stderr=err,
            )
            for rank, (out, err) in enumerate(files)
        ]
        ends = time.monotonic() + seconds
        try:
            while any([each.poll() is None for each in started]) and time.monotonic() < ends:  # all are reaped
                time.sleep(0.05)
        finally:
            for each in started:
                each.kill()
                each.wait()
        return [
            (each.returncode, *(_whole(file) for file in pair)) for each, pair in zip(started, files, strict=True)
        ]


def _whole(file):
    file.seek(0)
    return file.read()


def assert_close(one, other, where):
    """Two things that jobs came to are alike: tensors and numbers to 1e-5, all else equal."""
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, abs=1e-5), where
    elif isinstance(one, list | tuple):
        assert_close(dict(enumerate(one)), dict(enumerate(other)), where)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name, each in one.items():
            assert_close(each, other[name], f"{where} {name}")
    else:
        assert one == other, where
