"""The registry of prompts: loaded lazily by name, reloaded when files change, kept in an LRU cache.

A prompt that is never requested costs one entry of a listing. A running request keeps the version
it started with, so prompts may be replaced or evicted meanwhile.
"""

from __future__ import annotations

import difflib
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from softprompt.artifacts import Manifest, StoredPrompt, adapter_of_files
from softprompt.backbone import Base, Fingerprint, is_encoder_decoder
from softprompt.errors import (
    AdapterError,
    ArtifactError,
    ConfigError,
    FingerprintError,
    SoftPromptError,
    excerpt,
    in_options,
    nearest,
    without_folders,
)
from softprompt.inference import Task, task_number, tuned_of
from softprompt.prompts import KEY_VALUE_METHODS
from softprompt.server.folder import (
    FILES,
    FRESH_SECONDS,
    Outline,
    PromptFolder,
    Signature,
    is_fresh,
    is_name,
    outlined,
)
from softprompt.server.served import PlainText, Served

_TRIES = 5
"""Attempts to read a prompt whose files keep changing."""
_COMPARED = 64
"""Fingerprints whose comparison with the base is kept."""
_SEQ2SEQ = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}
_SERVED = (*_SEQ2SEQ, "FEATURE_EXTRACTION", None)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A prompt in the LRU cache: one ``Served`` for each task, or why it cannot be served."""

    signature: Signature
    tasks: tuple[Served, ...]
    names: tuple[str, ...] | None
    problem: str | None = None


@final
class Registry:
    """The prompts of one folder for one base model; thread-safe.

    Args:
        root: The folder.
        base: The base model.
        max_resident: Prompts in the LRU cache.
        max_bytes: Largest file of a prompt.
        ignore_fingerprint: Whether prompts that were made for another base are served too.
        base_names: Names of the base in requests, the first in answers; by default the last part of a path, or its
            Hub id.
        refuses: Says of a prompt's configuration why it cannot be computed here; empty where it can.

    Attributes:
        base_names: The same.
    """

    def __init__(
        self,
        root: PromptFolder,
        base: Base,
        *,
        max_resident: int,
        max_bytes: int,
        ignore_fingerprint: bool = False,
        base_names: Sequence[str] = (),
        refuses: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        self.base = base
        self.base_names = tuple(dict.fromkeys(base_names)) or (_public_name(base.name),)
        self.root = replace(root, taken=frozenset(self.base_names))
        plain = PlainText(base, seq2seq=is_encoder_decoder(base.model))
        self.base_served = Served(self.base_names[0], "base", plain)
        self._max_resident = max_resident
        self._max_bytes = max_bytes
        self._ignore_fingerprint = ignore_fingerprint
        self._known: OrderedDict[str, Loaded] = OrderedDict()
        self._outlines: dict[str, Outline] = {}
        self._compared: dict[Fingerprint, str | None] = {}
        self._withdrawn: set[str] = set()
        self._refuses = refuses
        self._guard = threading.Lock()
        self._loading = threading.Lock()

    @property
    def resident(self) -> int:
        """Number of prompts in memory."""
        with self._guard:
            return sum(loaded.problem is None for loaded in self._known.values())

    def names(self) -> list[str]:
        """Return the prompts that are not unloaded; raises NotServingError if the folder cannot be read."""
        found = self.root.names()
        with self._guard:
            return [n for n in found if n not in self._withdrawn]

    def sorted_out(self) -> tuple[list[str], dict[str, str]]:
        """Return the prompts that can be served, as far as their small files say, and why each other cannot."""
        ready, unusable = [], {}
        for name in self.names():
            try:
                problem = self.outline(name).problem
            except AdapterError:  # deleted meanwhile
                continue
            with self._guard:
                loaded = self._known.get(name)
            problem = problem or (loaded.problem if loaded else None)
            if problem:
                unusable[name] = problem
            else:
                ready.append(name)
        return ready, unusable

    def is_resident(self, name: str) -> bool:
        """Whether a prompt is in memory."""
        with self._guard:
            return name in self._known and self._known[name].problem is None

    def withdrawn(self) -> list[str]:
        """Return the names of unloaded prompts."""
        with self._guard:
            return sorted(self._withdrawn)

    def get(self, name: str, task: Task | None = None) -> Served:
        """Return the current version of a prompt; the base model by its own name.

        Raises:
            AdapterError: There is no such prompt, or it is unloaded.
            ArtifactError: Its files cannot be used.
            ConfigError: It has several tasks and none is given, or an unknown one.
        """
        if name in self.base_names:
            if task is not None:
                raise ConfigError(f"{name!r} is the base model, which has no tasks; leave task out")
            return self.base_served
        with self._guard:
            gone = name in self._withdrawn
        if gone:
            raise AdapterError(f"the prompt {name!r} is unloaded; load it to have it answer")
        loaded = self._present(name)
        first = loaded.tasks[0]
        if len(loaded.tasks) == 1 and loaded.names is None:
            if task not in (None, 0, "0"):
                raise ConfigError(
                    f"the prompt {name!r} has no task {excerpt(str(task))!r}, as it has no tasks; leave task out"
                )
            return first
        assert first.manifest is not None
        return loaded.tasks[task_number(task, first.manifest, len(loaded.tasks))]

    def load(self, name: str) -> Served:
        """Load a prompt, also one that was unloaded; see ``get``."""
        self._found(name)
        with self._guard:
            self._withdrawn.discard(name)
        return self._present(name).tasks[0]

    def unload(self, name: str) -> None:
        """Unload a prompt, running requests finish; raises AdapterError if there is no such prompt."""
        self._found(name)
        with self._guard:
            self._withdrawn.add(name)
            self._known.pop(name, None)

    def reload(self, name: str) -> Served:
        """Reload a prompt, whether or not its files have changed; see ``load``."""
        with self._guard:
            self._known.pop(name, None)
        return self.load(name)

    def poll(self) -> list[str]:
        """Evict prompts whose files have changed, and return their names; raises NotServingError as `names`."""
        self.root.check()  # also with no prompt known: one that was looked at while the folder went is evicted
        with self._guard:
            seen = [(name, loaded.signature) for name, loaded in self._known.items()]
            listed = list(self._outlines)
        changed = [name for name, signature in seen if self._signature(name) != signature]
        gone = [name for name in listed if self._signature(name) is None]
        with self._guard:
            for name in changed:
                self._known.pop(name, None)
            for name in gone:
                self._outlines.pop(name, None)
        return changed

    def outline(self, name: str) -> Outline:
        """Return a prompt's outline, from its small files; raises AdapterError if there is no such prompt."""
        return self._outlined(name, self._found(name))

    def _outlined(self, name: str, signature: Signature) -> Outline:
        with self._guard:
            known = self._outlines.get(name)
        if known is None or known.signature != signature:
            known = outlined(self.root, name, signature, self._max_bytes, self._check_fits)
            with self._guard:
                self._outlines[name] = known
        return known

    def stored(self, name: str) -> tuple[StoredPrompt, str]:
        """Read and check a prompt's files; return it with its version.

        Raises:
            AdapterError: There is no such prompt.
            ArtifactError: Its files cannot be used.
        """
        for _ in range(_TRIES):
            signature = self._found(name)
            if is_fresh(signature):
                time.sleep(FRESH_SECONDS)
                continue
            found = ((file, self.root.read(name, file, self._max_bytes)) for file in FILES)
            files = {file: data for file, data in found if data is not None}
            try:
                stored = adapter_of_files(files, name)
            except ArtifactError:
                if self.root.signature(name) == signature:
                    raise
                continue
            if self.root.signature(name) == signature:
                return stored, _digest(files)
        raise ArtifactError(f"the files of {name} keep changing while they are read; try again")

    def _found(self, name: str) -> Signature:
        """Return the signature of a prompt's files.

        Raises:
            AdapterError: There is no such prompt; the message names the nearest listed one.
        """
        try:
            return self.root.signature(name)
        except AdapterError:
            if name in self.base_names:
                raise AdapterError(
                    f"{name!r} is the base model, not a prompt; GET /v1/models lists the prompts"
                ) from None
            hint = nearest(name, self._listed_like(name)) if is_name(name) else ""
            if not hint:
                raise
            raise AdapterError(f"there is no prompt {name!r}{hint}; GET /v1/models lists them") from None

    def _listed_like(self, name: str) -> list[str]:
        """Return listed names similar to one; of a large folder only similar names are read."""
        like = difflib.get_close_matches(name, [*self.base_names, *self.root.entries()])
        return [each for each in like if each in self.base_names or self._is_listed(each)]

    def _is_listed(self, name: str) -> bool:
        with self._guard:
            if name in self._withdrawn:
                return False
        signature = self._signature(name)
        return signature is not None and self._outlined(name, signature).problem is None

    def _present(self, name: str) -> Loaded:
        signature = self._found(name)
        loaded = self._kept(name, signature)
        if loaded is None:
            with self._loading:
                loaded = self._kept(name, signature) or self._read(name, signature)
        if loaded.problem is not None:
            raise ArtifactError(loaded.problem)
        return loaded

    def _kept(self, name: str, signature: Signature) -> Loaded | None:
        with self._guard:
            loaded = self._known.get(name)
            if loaded is None or loaded.signature != signature:
                return None
            self._known.move_to_end(name)
            return loaded

    def _read(self, name: str, signature: Signature) -> Loaded:
        try:
            loaded = self._made(name, signature)
        except AdapterError:
            raise
        except SoftPromptError as error:
            # Cached as well: the same files would fail again. What the listing says is said here too.
            why = self._outlined(name, signature).problem or error
            problem = without_folders(in_options(f"the prompt {name!r} cannot be served: {why}"))
            loaded = Loaded(signature, (), None, problem)
        with self._guard:
            self._known[name] = loaded
            self._known.move_to_end(name)
            while len(self._known) > self._max_resident:
                self._known.popitem(last=False)
        return loaded

    def _made(self, name: str, signature: Signature) -> Loaded:
        stored, version = self.stored(name)
        self._check_fits(stored.config, stored.manifest)
        tuned = tuned_of(stored, self.base, ignore_fingerprint=self._ignore_fingerprint).snapshot()
        tuned.check_served()
        plain = self.base_served.plain
        every = [tuned.of_task(number) for number in range(len(tuned.task_names))]
        chats = [own.manifest.is_of_chats(own.rows.placement) if stored.manifest else None for own in every]
        tasks = tuple(Served(name, version, plain, *each) for each in zip(every, chats, strict=True))
        return Loaded(signature, tasks, tuned.whole.tasks)

    def _check_fits(self, config: dict[str, Any], manifest: Manifest | None) -> None:
        """Raise SoftPromptError unless a prompt of this configuration and record is one for the base."""
        task, name = config.get("task_type"), self.base_names[0]
        if self._refuses is not None and (why := self._refuses(config)):
            raise ConfigError(why)
        if task not in _SERVED:
            raise ConfigError(f"it is for {task}, with a head of its own; attach it with PeftModel.from_pretrained")
        if task in _SEQ2SEQ and _SEQ2SEQ[task] != self.base.is_encoder_decoder:
            kind = "seq2seq" if self.base.is_encoder_decoder else "causal"
            raise ConfigError(f"it is for {task}, the base {name} is a {kind} model; serve it over its own base")
        if manifest is not None and manifest.base_fingerprint and not self._ignore_fingerprint:
            reason = self._differs(Fingerprint.from_dict(manifest.base_fingerprint))
            if reason is not None:
                raise FingerprintError(
                    f"it was made for {_public_name(manifest.base_model)}, not for {name}: {reason}; serve it over "
                    "its own base, or pass --ignore-fingerprint"
                )
        # What else there is to check takes its weights, and passes of the base.
        width, own = config.get("token_dim"), self.base.facts.token_dim
        if width not in (None, own) and config["peft_type"] not in KEY_VALUE_METHODS:
            raise ConfigError(f"its token_dim is {width}, the base {name} has {own}; serve it over its own base")

    def _differs(self, made_for: Fingerprint) -> str | None:
        """Return why the base is not the one of a fingerprint, which most prompts of a folder share."""
        if made_for not in self._compared:
            if len(self._compared) >= _COMPARED:
                self._compared.clear()
            self._compared[made_for] = made_for.differs(self.base.fingerprint)
        return self._compared[made_for]

    def _signature(self, name: str) -> Signature | None:
        try:
            return self.root.signature(name)
        except AdapterError:
            return None


def _public_name(name: str) -> str:
    """Return what clients call a base: its Hub id or ``demo``, of a path the last part alone."""
    path = Path(name)
    return path.name if path.exists() or path.is_absolute() else name


def _digest(files: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in FILES:
        data = files.get(name)
        whole.update(b"-" if data is None else hashlib.sha256(data).digest())
    return whole.hexdigest()
