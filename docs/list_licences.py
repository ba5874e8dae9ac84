"""The licences of what an installation brings, from the packages' own metadata: ``python docs/list_licences.py``.

Rewrites the tables of ``dependencies.md``. Run it in the set-up of the README, after a change of dependencies.
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).parent / "dependencies.md"
LEFT_OUT = ("dev", "docs", "ray")
"""Extras that no user of the package needs, and one whose packages the set-up has not."""
OF_CUDA = re.compile(r"(cuda|nvidia)-|triton$")
"""What a torch for CUDA brings, and one for CPUs does not; the page says so in words."""
NAMES = {
    **dict.fromkeys(("Apache", "Apache 2.0", "Apache 2.0 License", "Apache Software License"), "Apache-2.0"),
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
}


def licence_of(name: str) -> str:
    """Return the licence that a package names: its expression, its classifiers, or a short line."""
    found = metadata.metadata(name)
    if given := found.get("License-Expression"):
        return given
    kinds = [each.split(" :: ")[-1] for each in found.get_all("Classifier") or [] if each.startswith("License :: ")]
    kinds = kinds or [(found.get("License") or "not named").strip().splitlines()[0][:60]]
    return " or ".join(dict.fromkeys(NAMES.get(kind, kind) for kind in kinds if kind != "OSI Approved"))


def needed_by(name: str, extras: set[str]) -> list[Requirement]:
    """Return what a package asks for here, with some of its extras."""
    asked = [Requirement(each) for each in metadata.requires(name) or []]
    markers = [{"extra": each} for each in extras or {""}]
    return [each for each in asked if not each.marker or any(map(each.marker.evaluate, markers))]


def brought_by(asked: list[Requirement]) -> set[str]:
    """Return the packages that some requirements bring, themselves included, where they are installed."""
    found: set[str] = set()
    left = [(canonicalize_name(each.name), frozenset(each.extras)) for each in asked]
    seen = set(left)
    while left:
        name, extras = left.pop()
        try:
            more = needed_by(name, set(extras))
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        asked_for = {(canonicalize_name(each.name), frozenset(each.extras)) for each in more}
        new = {each for each in asked_for if not OF_CUDA.match(each[0])} - seen
        seen |= new
        left += new
    return found


def tables() -> str:
    """Return the table of what is asked for, and that of what comes with it."""
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts = {"the package": project["dependencies"]} | {
        f"the extra `{extra}`": asked
        for extra, asked in project["optional-dependencies"].items()
        if extra not in LEFT_OUT
    }
    lines, direct, along = ["| package | licence | asked for by |", "|---|---|---|"], set(), set()
    for by, asked in parts.items():
        wanted = [Requirement(each) for each in asked]
        found = brought_by(wanted)
        along |= found
        for name in sorted({canonicalize_name(each.name) for each in wanted} & found - direct):
            lines.append(f"| {name} | {licence_of(name)} | {by} |")
            direct.add(name)
    others: dict[str, list[str]] = {}
    for name in sorted(along - direct):
        others.setdefault(licence_of(name), []).append(name)
    lines += ["", "These bring along:", "", "| licence | packages |", "|---|---|"]
    lines += [f"| {licence} | {', '.join(names)} |" for licence, names in sorted(others.items())]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the page's text with its tables, which are its end, made anew."""
    return text[: text.index("| package | licence |")] + tables()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
