"""``softprompt serve`` as a process of its own."""

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest


@contextmanager
def serving(prompts, *options):
    """Run the command on a free port until the block ends."""
    words = ["serve", "--base-model", "demo", "--prompts", str(prompts), "--port", "0", *options]
    process = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            # A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from softprompt.cli.main import main; main()",
            *words,
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                break
        else:
            pytest.fail("".join(lines))
        until_up(found[1])
        yield process, found[1], lines
    finally:
        process.kill()
        process.communicate()


def until_up(url):
    for _ in range(500):
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    pytest.fail("it never listened")
