"""The server under load: `softprompt serve` in a process of its own that can be killed and restarted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import httpx

START = "from softprompt.cli.main import main; main()"
ROOM = {"--max-prompts-resident": 5, "--max-batch-rows": 12, "--max-queue": 24}
"""Less room than the load needs, so that prompts come and go and the queue fills."""
PATIENCE = {"--stall-seconds": 2, "--body-seconds": 2}
_LISTENING = re.compile(r"listening on http://\S+:(\d+)")


class WrongAnswerError(Exception):
    """What came back is not what must come."""


@final
class ServerProcess:
    """One address, and the process that answers there.

    Attributes:
        port: Where it listens; 0 until the first start.
    """

    def __init__(
        self, prompts: Path, log: Path, *, base: str = "demo", options: Mapping[str, object] = ROOM | PATIENCE
    ) -> None:
        self.port = 0
        self._base = base
        self._options = options
        self._prompts = prompts
        self._log = log
        self._begun = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start a process; it takes some seconds until it answers."""
        command = [sys.executable, "-c", START, "serve", "--base-model", self._base]
        command += ["--prompts", str(self._prompts), "--port", str(self.port)]
        for option, value in self._options.items():
            command += [option, str(value)]
        with self._log.open("ab") as log:
            self._begun = log.tell()
            self._process = subprocess.Popen(command, stderr=log)

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            WrongAnswerError: It ended, or does not answer.
        """
        assert self._process is not None
        end = time.monotonic() + 600
        while self._process.poll() is None and time.monotonic() < end:
            found = _LISTENING.search(self._log.read_bytes()[self._begun :].decode())
            if found and self._is_ready(int(found[1])):
                self.port = int(found[1])
                return
            time.sleep(0.05)
        raise WrongAnswerError(f"the server does not start: {self._said()}")

    def kill(self) -> None:
        """End the process without a word to it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)

    def stop(self) -> None:
        """Tell the process to stop.

        Raises:
            WrongAnswerError: It does not end well, or has logged an error.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        said = self._log.read_text(errors="replace")
        if code != 0 or "Traceback" in said or "ERROR" in said:
            raise WrongAnswerError(f"the server ended with {code}: {self._said()}")

    def close(self) -> None:
        """Have no process left, whatever went wrong."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def hung_up(self) -> int:
        """Return how many clients it has hung up on as they stopped reading."""
        return self._log.read_text(errors="replace").count("stopped reading")

    def open_files(self) -> int:
        """Return how many files and sockets the process has open; 0 where that cannot be seen."""
        assert self._process is not None
        folder = Path(f"/proc/{self._process.pid}/fd")
        return len(os.listdir(folder)) if folder.exists() else 0

    def memory_mib(self) -> float:
        """Return the memory that the process has; 0 where that cannot be seen."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status")
        found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.exists() else None
        return int(found[1]) / 1024 if found else 0.0

    def metrics(self) -> dict[str, float]:
        """Return the server's own numbers, by name and labels."""
        lines = httpx.get(f"{self.address}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def _is_ready(self, port: int) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]
