"""The socket and the TLS files are checked before anything starts."""

import asyncio
import os
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from hetis.server.http_server import HttpServer
from hetis.server.listener import listen, remove, url_of
from hetis.server.options import ServerOptions
from tests.server.quiet_engine import frame


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_a_free_port_is_taken_and_named(host: str) -> None:
    options = ServerOptions(host=host, port=0)
    with listen(options) as listener:
        url = url_of(listener, options)
        assert url.rpartition(":")[0] in ("http://127.0.0.1", "http://[::1]")
        socket.create_connection(listener.getsockname()[:2]).close()


def test_a_port_in_use_is_refused_in_one_sentence() -> None:
    with listen(ServerOptions(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^port {port} of 127.0.0.1 is in use; give another --port, or end [^.]*\.$"
        ):
            listen(ServerOptions(port=port))
    with listen(ServerOptions(port=port)):
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host": "no-such-host.invalid"}, "host 'no-such-host.invalid' is no address of this machine"),
        ({"host": "192.0.2.1"}, "port 8000 of 192.0.2.1 cannot be used"),
        ({"uds": "/no/such/folder/s"}, "--uds /no/such/folder/s cannot be used (No such file"),
        ({"uds": "/tmp/" + "x" * 200}, "cannot be used"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        listen(ServerOptions(**options))
    assert sentence in str(error.value)


def test_a_unix_socket_replaces_a_stale_one_and_no_living_one_and_no_file(directory: Path) -> None:
    options = ServerOptions(uds=str(directory / "s"))
    before = os.umask(0o077)
    try:
        listener = listen(options)
    finally:
        os.umask(before)
    assert (directory / "s").stat().st_mode & 0o077 == 0, "by the umask"
    assert url_of(listener, options) == "http://localhost"
    with pytest.raises(ValueError, match="is in use"):
        listen(options)
    listener.close()  # as if it had been killed
    listen(options).close()
    remove(options)
    assert not (directory / "s").exists()
    (directory / "s").write_text("data")
    with pytest.raises(ValueError, match="is a file"):
        listen(options)
    assert (directory / "s").read_text() == "data"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem, key.pem; locked.pem, a key with a password."""
    folder = tmp_path_factory.mktemp("tls")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        [*make, "-noenc", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
    )
    lock = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", "-in", folder / "key.pem"]
    subprocess.run([*lock, "-out", folder / "locked.pem"], check=True, capture_output=True)
    (folder / "text.pem").write_text("not PEM")
    return folder


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem"}, None),
        ({"ssl_certfile": "missing.pem"}, "No such file"),
        ({"ssl_certfile": "text.pem", "ssl_keyfile": "key.pem"}, "not usable"),
        ({"ssl_certfile": "cert.pem", "ssl_keyfile": "text.pem"}, "not usable"),
        ({"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem"}, "the key without a password"),
        ({"ssl_certfile": "cert.pem"}, "not usable"),
        ({"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem", "ssl_ca_certs": "text.pem"}, "--ssl-ca-certs"),
    ],
)
def test_tls_files_are_checked_at_the_start(files: dict[str, str], word: str | None, certificates: Path) -> None:
    options = ServerOptions(port=0, **{name: str(certificates / file) for name, file in files.items()})  # type: ignore[arg-type]
    if word is None:
        with listen(options) as listener:
            assert url_of(listener, options).startswith("https://127.0.0.1:")
    else:
        with pytest.raises(ValueError) as error:
            listen(options)
        assert word in str(error.value)
        assert str(error.value).startswith("--ssl-c")


@pytest.mark.parametrize("has_certificate", [True, False])
def test_clients_may_have_to_show_certificates(has_certificate: bool, certificates: Path) -> None:
    files = {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem", "ssl_ca_certs": "cert.pem"}
    options = ServerOptions(port=0, ssl_cert_reqs=2, **{name: str(certificates / file) for name, file in files.items()})  # type: ignore[arg-type]
    context = ssl.create_default_context(cafile=str(certificates / "cert.pem"))
    if has_certificate:
        context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")

    async def ask() -> int:
        with listen(options) as listener:
            url = url_of(listener, options)
            server = HttpServer(frame()[1], options)
            task = asyncio.create_task(server.serve([listener]))
            try:
                async with httpx.AsyncClient(verify=context, trust_env=False, timeout=60) as client:
                    return (await client.get(f"{url}/livez")).status_code
            finally:
                server.stop(0)
                await task

    if has_certificate:
        assert asyncio.run(ask()) == 200
    else:
        with pytest.raises((httpx.HTTPError, ssl.SSLError)):
            asyncio.run(ask())
