"""The processes of a launcher: a script run once for each rank, as ``torchrun`` starts it, over gloo on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time


def run_ranks(script, *words, count=2, seconds=300):
    """Run ``script`` with words as ``sys.argv[1:]`` in processes; return (code, stdout, stderr) by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    meet["PYTHONPATH"] = os.pathsep.join(sys.path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            env={
                **os.environ,
                **meet,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ends = time.monotonic() + seconds
    try:
        while any([each.poll() is None for each in started]) and time.monotonic() < ends:  # all are reaped
            time.sleep(0.05)
    finally:
        for each in started:
            each.kill()
    return [(each.returncode, *each.communicate()) for each in started]
