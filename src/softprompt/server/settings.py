"""Settings of ``softprompt serve``; the command's options are made from these fields."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from softprompt.errors import ConfigError
from softprompt.fields import about, check, from_mapping
from softprompt.inference import Bounds

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
_SERVER, _ACCESS, _PROMPTS = "Model and address", "Access", "Prompts"
_LIMITS, _TIMES = "Request limits", "Timeouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Model, address, access, limits and timeouts of a server.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    base_model: str = field(
        metadata=about("Base model: folder, Hub id or 'demo'.", group=_SERVER),
    )
    prompts: str = field(
        metadata=about("Folder of prompts, one subfolder for each.", group=_PROMPTS)
    )
    host: str = field(default="127.0.0.1", metadata=about("Address to listen on.", group=_SERVER))
    port: int = field(
        default=8000,
        metadata=about(
            "Port to listen on; 0 chooses a free one.", least=0, most=65535, group=_SERVER
        ),
    )
    device: str | None = field(
        default=None, metadata=about("Device, such as cpu or cuda:0.", group=_SERVER)
    )
    torch_dtype: str | None = field(
        default=None,
        metadata=about("Data type of the base model; by default its files'.", group=_SERVER),
    )
    api_key_file: str | None = field(
        default=None,
        metadata=about(
            "File of API keys, one a line; /v1 and /metrics then require one.", group=_ACCESS
        ),
    )
    admin_key_file: str | None = field(
        default=None,
        metadata=about(
            "File of keys for loading and unloading prompts; without it administration is off.",
            group=_ACCESS,
        ),
    )
    allowed_origin: tuple[str, ...] = field(
        default=(),
        metadata=about("CORS: origin of web pages that may call the server.", group=_ACCESS),
    )
    allowed_host: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Allowed Host header besides localhost, while listening on localhost.", group=_ACCESS
        ),
    )
    max_prompt_bytes: int = field(
        default=64 * 2**20,
        metadata=about("Maximum size of a prompt's file, in bytes.", least=1, group=_PROMPTS),
    )
    poll_seconds: float = field(
        default=2.0,
        metadata=about(
            "Interval of polling the folder of prompts for changes.", above=0, group=_PROMPTS
        ),
    )
    max_metric_prompts: int = field(
        default=100,
        metadata=about(
            "Maximum number of prompts with metrics of their own; the others share one label.",
            least=0,
            group=_PROMPTS,
        ),
    )
    bounds: Bounds = field(default_factory=Bounds)
    max_request_rows: int = field(
        default=64,
        metadata=about(
            "Maximum number of answers or texts of one request.", least=1, group=_LIMITS
        ),
    )
    max_connections: int = field(
        default=1000,
        metadata=about(
            "Maximum number of open connections, idle ones included; beyond it requests get 503.",
            least=1,
            group=_LIMITS,
        ),
    )
    max_body_bytes: int = field(
        default=2**20,
        metadata=about(
            "Maximum size of a request's body, in bytes; beyond it 413.", least=1, group=_LIMITS
        ),
    )
    body_seconds: float = field(
        default=30.0,
        metadata=about("Timeout for receiving a request.", above=0, group=_TIMES),
    )
    request_seconds: float = field(
        default=300.0,
        metadata=about("Time limit of a request; answers end there.", above=0, group=_TIMES),
    )
    stall_seconds: float = field(
        default=30.0,
        metadata=about(
            "Timeout of a client that does not read its answer (slow reader).",
            above=0,
            group=_TIMES,
        ),
    )
    drain_seconds: float = field(
        default=30.0,
        metadata=about("Time for running answers to finish after SIGTERM.", above=0, group=_TIMES),
    )

    def __post_init__(self) -> None:
        """Check every value."""
        if isinstance(self.bounds, Mapping):
            object.__setattr__(self, "bounds", from_mapping(Bounds, self.bounds))
        check(self)
        for name in ("base_model", "prompts", "host"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty")
        for origin in self.allowed_origin:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allowed_origin expects what browsers send, such as https://page.example, got {origin!r}; "
                    "leave out all but scheme, host and port"
                )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
