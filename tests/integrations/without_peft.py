"""Run as a script: a Python in which PEFT cannot be found, by import or by metadata."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import runpy
import sys

_find, _distributions = (
    importlib.machinery.PathFinder.find_spec,
    importlib.metadata.MetadataPathFinder.find_distributions,
)


def _find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "peft" else _find(name, path, target)


def _find_distributions(context):
    return [] if getattr(context, "name", None) == "peft" else _distributions(context)


importlib.machinery.PathFinder.find_spec = staticmethod(_find_spec)
importlib.metadata.MetadataPathFinder.find_distributions = staticmethod(_find_distributions)
importlib.machinery.PathFinder.find_distributions = staticmethod(_find_distributions)

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
