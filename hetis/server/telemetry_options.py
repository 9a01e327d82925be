"""Checks of the options for metrics and traces; nothing here imports the libraries that they configure."""

import re
from importlib.util import find_spec
from urllib.parse import urlsplit

TRACES_PATH = "/v1/traces"  # of OTLP over HTTP

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_PREFIX = re.compile(r"(?:[a-zA-Z_][a-zA-Z0-9_]*:?)?")


def read_prefix(text: str) -> str:
    """`text` with the colon that ends a prefix. Raises ValueError for what cannot begin a name of Prometheus."""
    if not _PREFIX.fullmatch(text):
        raise ValueError(f"metrics_prefix is {text!r}: write letters, digits and underscores, like vllm.")
    return text if not text or text.endswith(":") else f"{text}:"


def traces_url(endpoint: str) -> str:
    """The URL to which spans are sent: a bare address gets the path of OTLP.

    Raises ValueError for what is no URL, and where the extra `otel` is not installed.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ValueError(f"otlp_traces_endpoint is {endpoint!r}: write a URL like http://localhost:4318.")
    if not all(map(is_installed, _NEEDED)):
        raise ValueError("otlp_traces_endpoint needs OpenTelemetry: pip install 'hetis[otel]'.")
    return endpoint if url.path.strip("/") else endpoint.rstrip("/") + TRACES_PATH


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent is
        return False
