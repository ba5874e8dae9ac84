"""What every test runs under: no network, properties that come out the same each time, quiet logging."""

from __future__ import annotations

import gc
import logging
import os

import pytest

# Read by huggingface_hub when it is imported, so it is set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("ALLOW_DOWNLOADS", None)

from hypothesis import HealthCheck, settings

from softprompt import progress

# A busy machine must not turn a property into a failure, and a failure must come back.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# The collector looks through more than a million objects that stay to the end, again and again: two thirds of the
# seconds of collecting the tests.
gc.disable()


def pytest_collection_finish():
    """Leave what was collected out of every later collection of garbage."""
    gc.freeze()
    gc.enable()


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
