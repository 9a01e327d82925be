"""The options of the HTTP server, checked as far as they can be without a fleet."""

import hashlib
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from hetis.core.config import LARGEST_COUNT
from hetis.server.telemetry_options import read_prefix, traces_url

KEY_VARIABLE = "HETIS_API_KEY"
LONGEST_KEY = 1024  # characters
MIN_BODY_BYTES = 1024


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `hetis serve` besides those of the fleet. Raises ValueError for values that cannot be used.

    Plain text of API keys is never kept: `api_key_digests` are their SHA-256 digests.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: one that is free
    uds: str | None = None  # path of a unix socket, instead of host and port
    root_path: str = ""  # prefix under which a proxy serves this server
    served_model_names: tuple[str, ...] = ()  # empty: the name of the model
    chat_template: str | None = None  # Jinja text
    generation_config: Literal["auto", "vllm"] = "auto"  # auto: sampling defaults of generation_config.json

    api_key_digests: tuple[bytes, ...] = ()  # empty: no key is needed
    allowed_origins: tuple[str, ...] = ()  # of CORS; empty: no CORS headers
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0  # of clients; 0: none, 1: optional, 2: required

    max_queued_requests: int | None = None  # sequences that may wait; None: 4 x max_num_seqs
    max_body_bytes: int = 4 << 20  # half a million token ids, or a million tokens of text
    shutdown_timeout: float = 30.0  # seconds for running requests after SIGTERM; 0: abort them at once
    health_timeout: float = 30.0  # seconds without progress after which /health is 503
    log_format: Literal["text", "json"] = "text"
    metrics_prefix: str = "hetis:"  # of all names of metrics; the colon may be left out
    otlp_traces_endpoint: str | None = None  # URL of a collector; None: no traces

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: it must be from 0 (any that is free) to 65535.")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path is {self.root_path!r}: it must begin with / and not end with it, like /llm.")
        if "" in self.served_model_names:
            raise ValueError("served_model_name is empty: give a name, or leave it out.")
        for origin in self.allowed_origins:
            _check_origin(origin)
        if not 0 <= (self.max_queued_requests or 0) <= LARGEST_COUNT:
            raise ValueError(
                f"max_queued_requests is {self.max_queued_requests}: it must be from 0 to {LARGEST_COUNT}."
            )
        if self.max_body_bytes < MIN_BODY_BYTES:
            raise ValueError(f"max_body_bytes is {self.max_body_bytes}: it must be at least {MIN_BODY_BYTES}.")
        for name, least in (("shutdown_timeout", 0), ("health_timeout", 3)):
            if not least <= getattr(self, name) <= 1_000_000:  # NaN fails too
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from {least} to 1000000 seconds.")
        read_prefix(self.metrics_prefix)
        if self.otlp_traces_endpoint is not None:
            traces_url(self.otlp_traces_endpoint)
        self._check_tls()

    def _check_tls(self) -> None:
        if (self.ssl_keyfile or self.ssl_ca_certs or self.ssl_cert_reqs) and not self.ssl_certfile:
            raise ValueError("ssl_certfile is missing: the other TLS options need the certificate of the server.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ValueError(
                f"ssl_cert_reqs is {self.ssl_cert_reqs}: it must be 0 (none), 1 (optional) or 2 (required)."
            )
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ValueError("ssl_cert_reqs asks clients for certificates: give ssl_ca_certs, which has their issuers.")

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine can reach the server."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, or empty for all addresses
            return False


def _check_origin(origin: str) -> None:
    """ValueError unless `origin` is "*", or scheme and host as browsers send them."""
    parts = urlsplit(origin)
    if origin != "*" and (parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"):
        raise ValueError(f"allowed_origins has {origin!r}: write origins like https://chat.example.org, or *.")


# --- API keys ---------------------------------------------------------------------------------------------------------


def digest(key: str) -> bytes:
    """SHA-256 of a key: digests have one length, so that a comparison tells nothing about the key's."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def key_digests(keys: Iterable[str], file: Path | None) -> tuple[bytes, ...]:
    """Digests of the keys on the command line, in `file` (one per line, "#" for comments) and in HETIS_API_KEY.

    The variable is removed, so that no process of the fleet inherits it. Raises ValueError, without the key, for keys
    that cannot be sent in a header, and for a file without keys.
    """
    found = [_checked(key, "--api-key") for key in keys]
    if file is not None:
        found += _keys_of(file)
    if (key := os.environ.pop(KEY_VARIABLE, None)) is not None:
        found.append(_checked(key.strip(), KEY_VARIABLE))
    return tuple(dict.fromkeys(map(digest, found)))


def _keys_of(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(
            f"--api-key-file {file} cannot be read ({reason}); give a file with one key per line."
        ) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file {file} has no key; write one key per line.")
    return [_checked(key, f"--api-key-file {file}") for key in keys]


def _checked(key: str, source: str) -> str:
    if not key:
        raise ValueError(f"{source} is empty; give a key, or leave it out.")
    if len(key) > LONGEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{source} has a key with spaces, control or non-ASCII characters, or over {LONGEST_KEY} of them."
        )
    return key
