"""What every test runs under: no network, properties that come out the same each time, quiet logging."""

from __future__ import annotations

import gc
import logging
import os
import signal
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

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

# The collector looks through more than a million objects that stay to the end, again and again: two thirds of the
# seconds of collecting the tests.
gc.disable()


FOLDERS = "artifacts batches cli contracts distillation evaluation inference inspection training".split()
"""For what is tested there it is all one whether a base was probed for it or before."""


@pytest.fixture(scope="session", autouse=True)
def what_was_collected_stays():
    """Leave it out of every later collection of garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def peft_finds_the_cache():
    """PEFT 0.21.2 knows no transformers from 5.24 on; what it does there is no oracle."""
    if CACHE != OLDER and find_spec("peft"):
        let_peft_find_it()


@pytest.fixture(scope="session", autouse=True)
def curves_without_pixels():
    """Draw the curve of each run and do not render it, which is a third of a small run; the tests of figures do."""
    from softprompt.display import figures  # not for the process that only hands tests out

    def drawn(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, "png_of", lambda figure: b"\x89PNG")
            figures.training_curve(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("training", "distillation"):
            patch.setattr(import_module(f"softprompt.{name}.run"), "training_curve", drawn)
        yield


@pytest.fixture(scope="module", autouse=True)
def bases_probed_once(request):
    """Let each base that is loaded have what was found of those of the same weights before."""
    if request.path.relative_to(Path(__file__).parent).parts[0] not in FOLDERS:
        yield
        return
    from oracles.probed import probed_once

    with probed_once():
        yield


@pytest.fixture(autouse=True)
def every_bar_is_closed():
    """A bar that is left open would hide all that is shown in its process from then on."""
    yield
    assert progress._within.get() == 0


LOGGER = logging.getLogger("softprompt")
QUIET = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate


def put_logging_back() -> None:
    """Have the library log as it does when it is imported."""
    LOGGER.handlers[:], LOGGER.propagate = QUIET[0], QUIET[2]
    LOGGER.setLevel(QUIET[1])


@pytest.fixture(autouse=True)
def logging_put_back():
    """The command line sets up logging for its process; tests of every folder share one.

    It is put back before each test too: fixtures of modules come first, and some run commands.
    """
    put_logging_back()
    yield
    put_logging_back()
