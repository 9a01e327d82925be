"""The server's socket and TLS files, checked before the fleet starts, so that a port in use is known at once."""

import errno
import os
import socket
import ssl
import stat
from contextlib import suppress
from pathlib import Path

from hetis.server.options import ServerOptions

BACKLOG = 2048  # connections that wait to be accepted


def listen(options: ServerOptions) -> socket.socket:
    """A listening socket. Raises ValueError if the address or path is in use, or cannot be used."""
    check_tls(options)
    listener = _unix_socket(Path(options.uds)) if options.uds is not None else _tcp_socket(options.host, options.port)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, options: ServerOptions) -> str:
    """Where clients on this machine find the server."""
    if options.uds is not None:
        return "http://localhost"
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if options.ssl_certfile else 'http'}://{shown}:{port}"


def _tcp_socket(host: str, port: int) -> socket.socket:
    where = f"port {port} of {host or 'all addresses'}"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ValueError(
            f"host {host!r} is no address of this machine ({error.strerror}); give another --host."
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"{where} is in use; give another --port, or end the program that has it.") from error
        raise ValueError(f"{where} cannot be used ({error.strerror}); give another --host or --port.") from error
    return listener


def _unix_socket(path: Path) -> socket.socket:
    """Its mode follows the umask: with the usual one only this user may connect."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise ValueError(f"--uds {path} is a file; name a path that is free.")
    if _is_answered(path):
        raise ValueError(f"--uds {path} is in use; name another path, or end the program that has it.")
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)  # of a server that was killed
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ValueError(
            f"--uds {path} cannot be used ({reason}); name a short path in a folder you may write."
        ) from error
    return listener


def _is_answered(path: Path) -> bool:
    """Whether a process listens at `path`."""
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(path))
        return True
    return False


def remove(options: ServerOptions) -> None:
    """Removes the unix socket's path."""
    if options.uds is not None:
        with suppress(OSError):
            os.unlink(options.uds)


def check_tls(options: ServerOptions) -> None:
    """Raises ValueError for certificate, key or issuers that cannot be used."""
    if options.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = f"--ssl-certfile {options.ssl_certfile}" + (
        f" with --ssl-keyfile {options.ssl_keyfile}" if options.ssl_keyfile else ""
    )
    try:
        # an empty password is refused, where none would make OpenSSL ask for it on the terminal
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password="")
        if options.ssl_ca_certs is not None:
            files = f"--ssl-ca-certs {options.ssl_ca_certs}"
            context.load_verify_locations(options.ssl_ca_certs)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else "not usable"
        raise ValueError(f"{files}: {reason}; give PEM files, the key without a password.") from error
