"""Options of the server: what is refused, in one sentence, and that keys stay secret."""

from pathlib import Path
from typing import Any

import pytest

from hetis.server.options import KEY_VARIABLE, ServerOptions, digest, key_digests

KEY = "sk-very-secret-1"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"port": 65536}, "port is 65536: it must be"),
        ({"port": -1}, "port is -1: it must be"),
        ({"root_path": "llm"}, "root_path is 'llm': it must begin with /"),
        ({"root_path": "/llm/"}, "root_path is '/llm/': it must begin with /"),
        ({"served_model_names": ("a", "")}, "served_model_name is empty"),
        ({"allowed_origins": ("chat.example.org",)}, "allowed_origins has 'chat.example.org'"),
        ({"allowed_origins": ("https://chat.example.org/",)}, "allowed_origins has"),
        ({"allowed_origins": ("https://u:p@x/y",)}, "allowed_origins has"),
        ({"max_queued_requests": -1}, "max_queued_requests is -1"),
        ({"max_body_bytes": 10}, "max_body_bytes is 10"),
        ({"shutdown_timeout": float("nan")}, "shutdown_timeout is nan"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout is -1"),
        ({"health_timeout": 1.0}, "health_timeout is 1.0: it must be from 3"),
        ({"metrics_prefix": "a-b"}, "metrics_prefix is 'a-b'"),
        ({"otlp_traces_endpoint": "localhost:4318"}, "otlp_traces_endpoint is 'localhost:4318'"),
        ({"ssl_keyfile": "key.pem"}, "ssl_certfile is missing"),
        ({"ssl_certfile": "c.pem", "ssl_cert_reqs": 3}, "ssl_cert_reqs is 3"),
        ({"ssl_certfile": "c.pem", "ssl_cert_reqs": 2}, "give ssl_ca_certs"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        ServerOptions(**options)
    assert str(error.value).startswith(sentence) or sentence in str(error.value)


def test_options_at_their_limits_are_accepted() -> None:
    ServerOptions(
        port=0, shutdown_timeout=0, max_queued_requests=0, max_body_bytes=1024, health_timeout=3, root_path="/a"
    )
    ServerOptions(allowed_origins=("*", "http://localhost:3000", "https://x.example"))


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "", "10.0.0.1", "gpu-box")),
    ],
)
def test_only_loopback_addresses_are_local(host: str, is_local: bool) -> None:
    assert ServerOptions(host=host).is_local is is_local
    assert ServerOptions(host=host, uds="/tmp/x").is_local


def test_keys_come_from_the_command_line_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n  {KEY}  \n\nsecond\n")
    monkeypatch.setenv(KEY_VARIABLE, "third")
    assert key_digests(["first", "second"], file) == tuple(map(digest, ("first", "second", KEY, "third")))
    assert key_digests([], None) == (), "the variable is read once and removed, so that no process inherits it"


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\nbreak", "\x00", "k" * 1025])
def test_keys_that_no_header_can_hold_are_refused_without_showing_them(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError) as error:
        key_digests([key], None)
    assert str(error.value).startswith("--api-key ")
    assert not key or key not in str(error.value)


@pytest.mark.parametrize(("content", "word"), [(b"# none\n\n", "has no key"), (b"\xff\xfe", "it is not text")])
def test_a_file_without_keys_is_refused(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=word):
        key_digests([], tmp_path / "keys")
    with pytest.raises(ValueError, match="No such file"):
        key_digests([], tmp_path / "missing")


def test_options_never_show_a_key() -> None:
    options = ServerOptions(api_key_digests=key_digests([KEY], None))
    assert KEY not in repr(options)
    assert KEY not in str(options)
