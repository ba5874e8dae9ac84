"""Access control: API keys, compared in constant time, and allowed Host headers (DNS rebinding)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from fastapi import Request

from softprompt.errors import UsageError, excerpt
from softprompt.server.errors import Problem
from softprompt.server.settings import ServeSettings

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """SHA-256 digests of API keys; whether none admits everybody or nobody is for the caller."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Sequence[str]) -> Self:
        """Return the digests of keys."""
        return cls(tuple(_digest(key) for key in keys))

    @classmethod
    def read(cls, path: str | None) -> Self:
        """Read a key file, one key a line; None is no keys.

        Raises:
            UsageError: The file cannot be read, or is empty.
        """
        if path is None:
            return cls()
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the file of keys {path} cannot be read ({error})") from error
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise UsageError(f"the file of keys {path} is empty; put one key on each line")
        return cls.of(keys)

    def accept(self, key: str) -> bool:
        """Whether a key is among these; takes the same time for every key."""
        given = _digest(key)
        found = False
        for digest in self.digests:
            found |= hmac.compare_digest(given, digest)
        return found

    def __bool__(self) -> bool:
        return bool(self.digests)


@dataclass(frozen=True, slots=True)
class Access:
    """API keys and allowed hosts of one server.

    Attributes:
        users: Keys for /v1 and /metrics; none are required where it is empty.
        admins: Keys for /v1/prompts, valid for the rest, too; where empty, administration is off.
        hosts: Allowed Host headers; None allows all.
    """

    users: Keys
    admins: Keys
    hosts: frozenset[str] | None

    @classmethod
    def of(cls, settings: ServeSettings) -> Self:
        """Return the access of settings; reads the key files.

        Raises:
            UsageError: A key file cannot be read, or is empty.
        """
        # DNS rebinding: a page may resolve its own name to 127.0.0.1; its requests then carry that name.
        hosts = frozenset({*LOCAL_HOSTS, *settings.allowed_host}) if settings.is_local else None
        return cls(Keys.read(settings.api_key_file), Keys.read(settings.admin_key_file), hosts)

    def check_host(self, header: str) -> None:
        """Check the Host header.

        Raises:
            Problem: 421, the host is not allowed.
        """
        if self.hosts is None:
            return
        try:
            host = urlsplit(f"//{header}").hostname
        except ValueError:
            host = None
        if host not in self.hosts:
            raise Problem(
                421, f"this server is not {excerpt(header)!r}; start it with --allowed-host"
            )

    def check_user(self, request: Request) -> None:
        """Require a user's key, if there are any.

        Raises:
            Problem: 401, the key is missing or unknown.
        """
        if not self.users:
            return
        key = _bearer(request)
        if not (self.users.accept(key) | self.admins.accept(key)):
            raise _unknown_key()

    def check_admin(self, request: Request) -> None:
        """Require an administrator's key.

        Raises:
            Problem: 403, administration is off; 401, the key is missing or unknown.
        """
        if not self.admins:
            raise Problem(403, "administration is off; start the server with --admin-key-file")
        if not self.admins.accept(_bearer(request)):
            raise _unknown_key()


def _bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _unknown_key() -> Problem:
    return Problem(
        401,
        "expected a known key in the header 'Authorization: Bearer KEY'",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
