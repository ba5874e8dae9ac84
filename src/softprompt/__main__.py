"""``python -m softprompt`` is the command ``softprompt``."""

from __future__ import annotations

from softprompt.cli.main import main

if __name__ == "__main__":
    main()
