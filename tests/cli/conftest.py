"""The command line sets up logging for its process; tests share one, so it is put back."""

import logging

import pytest


@pytest.fixture(autouse=True)
def logging_put_back():
    logger = logging.getLogger("softprompt")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
