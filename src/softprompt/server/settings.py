"""Settings of ``softprompt serve``; the command's options are made from these fields."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from softprompt.errors import ConfigError
from softprompt.fields import check, from_mapping, setting
from softprompt.generation import Bounds

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
_SERVER_ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#\s]*)?")
"""Without a name and password, which would be in logs and metrics."""
_SERVER, _ACCESS, _PROMPTS = "Model and address", "Access", "Prompts"
_LIMITS, _TIMES = "Request limits", "Timeouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Model, address, access, limits and timeouts of a server.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    base_model: str = setting(MISSING, "Base model: folder, Hub id, GGUF file or 'demo'.", group=_SERVER)
    engine: Literal["own", "vllm"] = setting(
        "own", "What computes: this process, or vLLM servers (--upstream).", group=_SERVER
    )
    upstream: tuple[str, ...] = setting(
        (), "Address of a vLLM server, such as http://host:8000; several are used in turn.", group=_SERVER
    )
    prompts: str = setting(
        MISSING, "Folder of prompts, one subfolder for each; or a Hub collection or repository.", group=_PROMPTS
    )
    host: str = setting("127.0.0.1", "Address to listen on.", group=_SERVER)
    port: int = setting(8000, "Port to listen on; 0 chooses a free one.", least=0, most=65535, group=_SERVER)
    device: str | None = setting(None, "Device, such as cpu or cuda:0.", group=_SERVER)
    torch_dtype: str | None = setting(None, "Data type of the base model; by default its files'.", group=_SERVER)
    served_model_name: tuple[str, ...] = setting(
        (), "Name of the base model in requests instead of its own; the first is that of answers.", group=_SERVER
    )
    api_key_file: str | None = setting(
        None, "File of API keys, one a line; /v1 and /metrics then require one.", group=_ACCESS
    )
    admin_key_file: str | None = setting(
        None, "File of keys for loading and unloading prompts; without it administration is off.", group=_ACCESS
    )
    upstream_key_file: str | None = setting(None, "File with the API key of the vLLM servers.", group=_ACCESS)
    ignore_fingerprint: bool = setting(
        False, "Serve prompts that were made for another base model too.", group=_PROMPTS
    )
    access_log: bool = setting(
        False, "Log each request: method, path, status, seconds, prompt, tokens; no content.", group=_ACCESS
    )
    allowed_origin: tuple[str, ...] = setting(
        (), "CORS: origin of web pages that may call the server.", group=_ACCESS
    )
    allowed_host: tuple[str, ...] = setting(
        (), "Allowed Host header besides localhost, while listening on localhost.", group=_ACCESS
    )
    max_prompt_bytes: int = setting(
        64 * 2**20, "Maximum size of a prompt's file, in bytes.", least=1, group=_PROMPTS
    )
    poll_seconds: float = setting(
        2.0, "Interval of polling the folder of prompts for changes.", above=0, group=_PROMPTS
    )
    max_metric_prompts: int = setting(
        100,
        "Maximum number of prompts with metrics of their own; the others share one label.",
        least=0,
        group=_PROMPTS,
    )
    bounds: Bounds = field(default_factory=Bounds)
    max_request_rows: int = setting(
        64, "Maximum number of answers or texts of one request.", least=1, group=_LIMITS
    )
    max_connections: int = setting(
        1000,
        "Maximum number of open connections, idle ones included; beyond it requests get 503.",
        least=1,
        group=_LIMITS,
    )
    max_body_bytes: int = setting(
        2**20, "Maximum size of a request's body, in bytes; beyond it 413.", least=1, group=_LIMITS
    )
    body_seconds: float = setting(30.0, "Timeout for receiving a request.", above=0, group=_TIMES)
    request_seconds: float = setting(300.0, "Time limit of a request; answers end there.", above=0, group=_TIMES)
    upstream_seconds: float = setting(120.0, "Timeout of a vLLM server that sends nothing.", above=0, group=_TIMES)
    stall_seconds: float = setting(
        30.0, "Timeout of a client that does not read its answer (slow reader).", above=0, group=_TIMES
    )
    drain_seconds: float = setting(30.0, "Time for running answers to finish after SIGTERM.", above=0, group=_TIMES)

    def __post_init__(self) -> None:
        """Check every value."""
        if isinstance(self.bounds, Mapping):
            object.__setattr__(self, "bounds", from_mapping(Bounds, self.bounds))
        check(self)
        for name in ("base_model", "prompts", "host"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty")
        if not all(self.served_model_name):
            raise ConfigError("served_model_name must not be empty")
        addresses = tuple(each.strip() for given in self.upstream for each in given.split(",") if each.strip())
        object.__setattr__(self, "upstream", addresses)
        if (self.engine == "vllm") != bool(addresses):
            raise ConfigError("engine vllm and upstream go together: --engine vllm --upstream http://host:8000")
        for address in addresses:
            if not _is_address(address):
                raise ConfigError(f"upstream expects an address such as http://host:8000, got {address!r}")
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


def _is_address(text: str) -> bool:
    try:
        return _SERVER_ADDRESS.fullmatch(text) is not None and urlsplit(text).port != 0
    except ValueError:  # no port, or no IPv6 address
        return False
