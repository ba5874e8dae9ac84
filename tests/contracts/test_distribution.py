"""What is released: reproducible, whole, and enough in an environment that has nothing else."""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import softprompt

ROOT = Path(__file__).parents[2]
SMOKE = """
import softprompt
from softprompt.bundled import complaints
prompt = softprompt.tune("demo", complaints("train"), max_steps=2, output="prompt", silence_progress_bars=True)
again = softprompt.load("prompt")
assert again("The kettle broke.") in ("complaint", "no complaint")
"""


def build(folder):
    """Return the wheel and the sdist of a build, by name."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("built"))


@pytest.mark.slow
def test_the_same_tree_gives_the_same_files(built, tmp_path):
    first, second = (
        {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in each.items()}
        for each in (built, build(tmp_path))
    )
    assert first == second
    version = softprompt.__version__
    assert list(first) == [f"softprompt-{version}-py3-none-any.whl", f"softprompt-{version}.tar.gz"]


def test_the_version_is_the_same_wherever_it_is_written():
    changes, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    released = re.findall(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", changes, re.M)
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", citation, re.M))
    assert cited == {"version": softprompt.__version__, "date-released": released[0][1]}
    assert released[0][0] == softprompt.__version__


def test_the_wheel_ships_the_package_and_nothing_else(built):
    wheel = next(path for name, path in built.items() if name.endswith(".whl"))
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert names == {line.removeprefix("src/") for line in tracked.stdout.splitlines() if (ROOT / line).exists()}
    for needed in ("py.typed", "__init__.pyi", "bundled/model/model.safetensors", "server/page/index.html"):
        assert f"softprompt/{needed}" in names


def test_the_sdist_can_be_built_from(built):
    archive = next(path for name, path in built.items() if name.endswith(".tar.gz"))
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "src/softprompt/__init__.py"} <= names
    read_by_tests = {
        "Dockerfile",
        ".dockerignore",
        "compose.yaml",
        "deploy/kubernetes.yaml",
        "mkdocs.yml",
        "Makefile",
    }
    assert read_by_tests | {"tests/integrations/test_deployment.py", "docs/index.md", "bench/gpu.py"} <= names


def test_every_extra_that_a_message_names_exists():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(
        re.findall(
            r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
        )
    )
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"softprompt\[(\w+)\]", source))
    assert named and named <= extras


@pytest.mark.slow
def test_it_works_in_an_empty_environment(built, tmp_path):
    wheel = next(path for name, path in built.items() if name.endswith(".whl"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "empty"], check=True)
    python = tmp_path / "empty/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(install, check=True, env=clean)
    subprocess.run([python, "-c", SMOKE], check=True, cwd=tmp_path, env=clean)
    said = subprocess.run([python.with_name("softprompt"), "--version"], check=True, env=clean, capture_output=True)
    assert softprompt.__version__ in said.stdout.decode()
