"""Link between processes of different hosts: one TCP connection, read and written in place.

A message is its size in eight bytes, then itself; the size is there to notice that the two ends disagree. What the
kernel's buffers do not take at once is written by a thread, so that `send` never waits for the peer. A plain socket
instead of zmq: two thread changes less in either direction, no copy on receiving, and the kernel reports a dead peer.
"""

import hmac
import queue
import secrets
import socket
import struct
import threading
import time

import msgspec
import torch
from torch import Tensor

from hetis.comm.links.base import NUM_SLOTS, Link, check_agreement, check_size
from hetis.comm.rendezvous import Rendezvous

_HEADER = struct.Struct("<Q")
_HELLO_SECONDS = 2.0  # for a newcomer to show its token
_LINGER_SECONDS = 2.0  # for the peer to take what is left of a message when this end closes
_KEEPALIVE_SECONDS = 5  # of silence before the kernel asks whether the other host still runs, five times


class _Slot:
    """A message of this end: its memory, and whether the kernel still has to take some of it."""

    def __init__(self, max_bytes: int, pinned: bool) -> None:
        self.memory_B = torch.empty(max_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.view = self.memory_B.numpy().data
        self.is_free = threading.Event()
        self.is_free.set()


class TcpLink(Link):
    kind = "tcp"

    def __init__(
        self,
        connection: socket.socket,
        peer_rank: int,
        max_send_bytes: int,
        max_recv_bytes: int,
        pinned: bool = False,
    ) -> None:
        """Owns `connection` from now on. `pinned`: page-locked buffers, for copies to and from a CUDA device."""
        _tune(connection)
        self._socket, self._peer_rank = connection, peer_rank
        self._out = [_Slot(max_send_bytes, pinned) for _ in range(NUM_SLOTS)]
        self._in = _Slot(max_recv_bytes, pinned)
        self._header = bytearray(_HEADER.size)
        self._num_sent, self._pending_bytes = 0, 0
        self._rest: queue.SimpleQueue[tuple[_Slot, list[memoryview]] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._error: OSError | None = None

    def send_buffer(self, num_bytes: int) -> Tensor:
        slot = self._out[self._num_sent % NUM_SLOTS]
        check_size(num_bytes, len(slot.view))
        slot.is_free.wait()
        if self._error:
            raise self._lost(self._error)
        self._pending_bytes = num_bytes
        return slot.memory_B[:num_bytes]

    def send(self) -> None:
        slot = self._out[self._num_sent % NUM_SLOTS]
        previous = self._out[(self._num_sent - 1) % NUM_SLOTS]
        message = [memoryview(_HEADER.pack(self._pending_bytes)), slot.view[: self._pending_bytes]]
        rest = message
        if previous.is_free.is_set():
            try:
                rest = _advance(message, self._socket.sendmsg(message, (), socket.MSG_DONTWAIT))
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._lost(error) from None
        if rest:
            self._write_later(slot, rest)
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, len(self._in.view))
        rest = [memoryview(self._header), self._in.view[:num_bytes]]
        try:
            while rest:
                count = self._socket.recvmsg_into(rest, 0, socket.MSG_WAITALL)[0]
                if count == 0:
                    raise ConnectionResetError("end of stream")
                rest = _advance(rest, count)
        except OSError as error:
            raise self._lost(error) from None
        check_agreement(num_bytes, _HEADER.unpack(self._header)[0])
        self.bytes_received += num_bytes
        return self._in.memory_B[:num_bytes]

    def release(self) -> None:
        pass  # the kernel holds what comes meanwhile

    def close(self) -> None:
        if self._writer is not None:
            self._rest.put(None)
            self._writer.join(_LINGER_SECONDS)
            self._writer = None
        self._socket.close()

    def _write_later(self, slot: _Slot, rest: list[memoryview]) -> None:
        slot.is_free.clear()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="hetis-tcp-writer", daemon=True)
            self._writer.start()
        self._rest.put((slot, rest))

    def _write(self) -> None:
        while (entry := self._rest.get()) is not None:
            slot, rest = entry
            try:
                while rest and self._error is None:
                    rest = _advance(rest, self._socket.sendmsg(rest))
            except OSError as error:
                self._error = error
            slot.is_free.set()

    def _lost(self, error: OSError) -> ConnectionError:
        return ConnectionError(f"the connection to rank {self._peer_rank} was lost: {error.strerror or error}.")


def _advance(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` after their first `count` bytes."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(buffer[count:])
        count = max(0, count - len(buffer))
    return rest


def _tune(connection: socket.socket) -> None:
    """No waiting for more to send; a host that lost its power is noticed although it says nothing.

    No TCP_USER_TIMEOUT: it would also end the connection to a peer that merely does not read for a while.
    """
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)


# --- opening ---------------------------------------------------------------------------------------------------------


class _Offer(msgspec.Struct):
    host: str
    port: int
    token: bytes
    limits: tuple[int, int]


def open_tcp(
    rendezvous: Rendezvous,
    key: str,
    *,
    address: str,
    peer_rank: int,
    is_primary: bool,
    limits: tuple[int, int],
    timeout: float,
    pinned: bool = False,
) -> TcpLink:
    """Opens this rank's end. The primary listens on its `address` (never on all interfaces), on a free port.

    Whoever connects must show a token that went over the rendezvous. TimeoutError if the peer does not come within
    `timeout` seconds; ValueError if `address` is not one of this host.
    """
    if is_primary:
        token = secrets.token_bytes(32)
        with _listen(address) as listener:
            host, port = listener.getsockname()[:2]
            rendezvous.set(f"{key}/tcp", msgspec.msgpack.encode(_Offer(host, port, token, limits)))
            connection = _accept(listener, token, peer_rank, timeout)
        return TcpLink(connection, peer_rank, limits[0], limits[1], pinned)
    offer = msgspec.msgpack.decode(rendezvous.get(f"{key}/tcp", timeout), type=_Offer)
    assert offer.limits == limits, f"the ends of {key} plan messages of {offer.limits} and {limits} bytes"
    try:
        connection = socket.create_connection((offer.host, offer.port), timeout)
        connection.sendall(offer.token)
    except OSError as error:
        raise ConnectionError(
            f"rank {peer_rank} at {offer.host}:{offer.port} cannot be reached ({error}): is the address right?"
        ) from None
    return TcpLink(connection, peer_rank, limits[1], limits[0], pinned)


def _listen(address: str) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=8)
    except OSError as error:
        raise ValueError(f"cannot listen on {address} ({error}): give an address of this host.") from None


def _accept(listener: socket.socket, token: bytes, peer_rank: int, timeout: float) -> socket.socket:
    """The first connection that shows the token."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        if hmac.compare_digest(_shown_by(connection, len(token)), token):
            return connection
        connection.close()
    raise TimeoutError(f"rank {peer_rank} did not connect to {listener.getsockname()[:2]} within {timeout:g} s.")


def _shown_by(connection: socket.socket, num_bytes: int) -> bytes:
    """The first bytes of a newcomer, fewer if it does not send them soon."""
    connection.settimeout(_HELLO_SECONDS)
    shown = b""
    try:
        while len(shown) < num_bytes and (piece := connection.recv(num_bytes - len(shown))):
            shown += piece
    except OSError:
        pass  # too slow, or gone again
    return shown
