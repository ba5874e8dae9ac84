"""What every test runs under: no network, and properties that come out the same each time."""

from __future__ import annotations

import os

# Read by huggingface_hub when it is imported, so it is set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("ALLOW_DOWNLOADS", None)

from hypothesis import HealthCheck, settings

# A busy machine must not turn a property into a failure, and a failure must come back.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
