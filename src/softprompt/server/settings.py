"""What `softprompt serve` may be told; the options of the command line are made from these fields."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

from softprompt.errors import ConfigError
from softprompt.fields import about, check

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Where to listen, who may ask, and what may be used up.

    Raises:
        ConfigError: A value is of the wrong type or out of its range.
    """

    base_model: str = field(metadata=about("Base model: folder, Hub id or 'demo'."))
    prompts: str = field(metadata=about("Folder with one folder for each prompt."))
    host: str = field(default="127.0.0.1", metadata=about("Address to listen on."))
    port: int = field(
        default=8000, metadata=about("Port to listen on; 0 takes a free one.", least=0, most=65535)
    )
    device: str | None = field(
        default=None, metadata=about("Device to run on, such as cpu or cuda:0.")
    )
    torch_dtype: str | None = field(
        default=None, metadata=about("Data type of the base; by default that of its files.")
    )
    api_key_file: str | None = field(
        default=None,
        metadata=about("File of keys, one a line; requests to /v1 and /metrics must carry one."),
    )
    admin_key_file: str | None = field(
        default=None,
        metadata=about("File of keys for loading and unloading prompts; off without it."),
    )
    allowed_origin: tuple[str, ...] = field(
        default=(), metadata=about("Origin of web pages that may call the server (CORS).")
    )
    allowed_host: tuple[str, ...] = field(
        default=(),
        metadata=about("Host header to answer besides localhost while listening there only."),
    )
    max_prompts_resident: int = field(
        default=64, metadata=about("Prompts kept in memory; the least used one goes.", least=1)
    )
    max_prompt_tokens: int = field(
        default=16384, metadata=about("Virtual tokens whose keys and values are kept.", least=1)
    )
    max_prompt_bytes: int = field(
        default=64 * 2**20, metadata=about("Largest file of a prompt.", least=1)
    )
    ordered_weights: bool = field(
        default=True,
        metadata=about(
            "Keep a second copy of a float32 base, ordered for the CPU; used where that is faster."
        ),
    )
    max_batch_rows: int = field(
        default=32, metadata=about("Answers that are generated at once.", least=1)
    )
    max_step_tokens: int = field(
        default=2048, metadata=about("Tokens run in one pass of the model.", least=1)
    )
    max_cached_tokens: int = field(
        default=65536, metadata=about("Tokens of running answers whose keys are kept.", least=1)
    )
    max_waiting: int = field(
        default=256, metadata=about("Requests that may wait; more are refused (429).", least=1)
    )
    max_request_rows: int = field(
        default=64, metadata=about("Answers, or scored texts, of one request.", least=1)
    )
    max_score_rows: int = field(
        default=512, metadata=about("Labels of texts that are scored in one pass.", least=1)
    )
    max_connections: int = field(
        default=1000,
        metadata=about("Open connections, idle ones too; requests on more get 503.", least=1),
    )
    max_body_bytes: int = field(
        default=2**20, metadata=about("Largest request; more is refused (413).", least=1)
    )
    body_seconds: float = field(default=30.0, metadata=about("Time to send a request in.", above=0))
    request_seconds: float = field(
        default=300.0, metadata=about("Time an answer may take; it ends there.", above=0)
    )
    stall_seconds: float = field(
        default=30.0,
        metadata=about(
            "Time a client may leave an answer unread before it is hung up on.", above=0
        ),
    )
    drain_seconds: float = field(
        default=30.0, metadata=about("Time for running answers after SIGTERM.", above=0)
    )
    poll_seconds: float = field(
        default=2.0, metadata=about("Time between looks at the prompts' folder.", above=0)
    )
    max_metric_prompts: int = field(
        default=100,
        metadata=about("Prompts with metrics of their own; the rest are one.", least=0),
    )

    def __post_init__(self) -> None:
        """Check every value."""
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
