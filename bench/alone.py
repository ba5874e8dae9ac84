"""What keeps a bench to one process: several that a launcher started would all do its work, and all print it."""

from __future__ import annotations

import sys
from pathlib import Path

from softprompt.world import launched


def alone() -> None:
    """Leave where a launcher started several processes; the first of them says why."""
    ranks = launched()
    if ranks.size == 1:
        return
    if ranks.is_main:
        why = "runs in one process; start it without torchrun, or bench/ranks.py with it"
        print(f"{Path(sys.argv[0]).name} {why}", file=sys.stderr)
    raise SystemExit(2)
