"""The Hugging Face Hub as a folder: what leaves through huggingface_hub is kept there, and comes from there."""

from __future__ import annotations

import shutil
import types
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi

from softprompt.artifacts import hub, peft_folder


class LocalHub:
    """Repositories as folders ``org/name`` below ``root``; ``collections`` are lists of their names by slug."""

    def __init__(self, root):
        self.root, self.collections, self.calls, self.fetched = Path(root), {}, {}, []

    def install(self, monkeypatch):
        """Put this in the place of huggingface_hub's functions."""
        monkeypatch.setattr(peft_folder, "snapshot_download", self.snapshot)
        monkeypatch.setattr(hub, "get_collection", self.collection)
        monkeypatch.setattr(HfApi, "create_repo", self.create)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)
        return self

    def create(self, name, **options):
        self.calls["create"] = options
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=name)

    def upload(self, *, repo_id, folder_path, **options):
        self.calls["upload"] = options
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot(self, name, *, allow_patterns, **options):
        """Return a folder of links to blobs, as the cache has them."""
        if not (self.root / name).is_dir():
            raise OSError(f"404: no repository {name}")
        target = self.root / ".cache" / str(len(self.fetched)) / name
        for path in sorted((self.root / name).rglob("*")):
            inside = path.relative_to(self.root / name).as_posix()
            if path.is_file() and any(fnmatch(inside, pattern) for pattern in allow_patterns):
                (target / inside).parent.mkdir(parents=True, exist_ok=True)
                (target / inside).symlink_to(path)
        target.mkdir(parents=True, exist_ok=True)
        self.fetched.append(name)
        return str(target)

    def collection(self, slug, **options):
        items = [types.SimpleNamespace(item_id=name, item_type=kind) for name, kind in self.collections[slug]]
        return types.SimpleNamespace(items=items)
