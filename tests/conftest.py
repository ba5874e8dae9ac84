"""What every test runs under: no network, properties that come out the same each time, quiet logging."""

from __future__ import annotations

import logging
import os
import signal
from importlib.util import find_spec

import pytest

# Read by huggingface_hub when it is imported, so it is set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("ALLOW_DOWNLOADS", None)

from hypothesis import HealthCheck, settings

from oracles.caches import CACHE, OLDER, let_peft_find_it
from softprompt import progress

# A busy machine must not turn a property into a failure, and a failure must come back.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# A suite started with nohup or & would hand its ignored signals down to the commands that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def peft_finds_the_cache():
    """PEFT 0.21.2 knows no transformers from 5.24 on; what it does there is no oracle."""
    if CACHE != OLDER and find_spec("peft"):
        let_peft_find_it()


@pytest.fixture(autouse=True)
def every_bar_is_closed():
    """A bar that is left open would hide all that is shown in its process from then on."""
    yield
    assert progress._within.get() == 0


@pytest.fixture(autouse=True)
def logging_put_back():
    """The command line sets up logging for its process; tests of every folder share one."""
    logger = logging.getLogger("softprompt")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
