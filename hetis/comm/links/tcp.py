"""Link between processes of different hosts: a zmq PAIR over TCP.

A peer authenticates with a token from the rendezvous, which the listening end checks in zmq's PLAIN handshake.
Large messages are sent from their buffer without a copy; received messages are copied once, into an aligned buffer.
Spinning does not pay: zmq's thread needs the core. That thread receives some messages ahead of the reader, so a sender
mostly waits only until its buffers have left this host; only the plan bounds how many small messages zmq has copied.
"""

import ipaddress
import secrets
import socket
import time

import msgspec
import torch
import zmq
from torch import Tensor
from zmq.utils.monitor import recv_monitor_message

from hetis.comm.links.base import NUM_BUFFERS, Link, LinkEnd, check_agreement, check_size

ZERO_COPY_BYTES = 512 * 1024  # below, zmq's copy costs less than tracking when a buffer is free again
_CHECK_INTERVAL_MS = 100  # longest wait before the connection is checked
_LINGER_MS = 2000  # for the peer to receive the rest of a message when this end closes
_MAX_UNREAD = 8  # messages at the receiving end before TCP blocks the sender
_KEEPALIVE_SECONDS = 5  # of silence before the kernel probes the other host, five times
_MAX_HANDSHAKE_BYTES = 1024
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # where zmq sends authentication requests (rfc.zeromq.org/spec/27)
_ZAP_ACCEPTED, _ZAP_REFUSED = b"200", b"400"


class TcpLink(Link):
    kind = "tcp"

    def __init__(
        self,
        pair: zmq.Socket[bytes],
        peer_rank: int,
        max_send_bytes: int,
        max_recv_bytes: int,
        pinned: bool = False,
        monitor: zmq.Socket[bytes] | None = None,
    ) -> None:
        """Takes ownership of `pair` and its context. `pinned`: page-locked buffers. `monitor`: readable once lost."""
        self._pair, self._peer_rank, self._monitor = pair, peer_rank, monitor
        self._out_2B = [torch.empty(max_send_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(NUM_BUFFERS)]
        self._out_views = [buffer_B.numpy().data for buffer_B in self._out_2B]
        self._in_B = torch.empty(max_recv_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._in_view = self._in_B.numpy().data
        self._trackers = [zmq.MessageTracker() for _ in range(NUM_BUFFERS)]  # done once zmq has sent the buffer
        self._num_sent, self._pending_bytes = 0, 0

    def send_buffer(self, num_bytes: int) -> Tensor:
        turn = self._num_sent % NUM_BUFFERS
        check_size(num_bytes, self._out_2B[turn].numel())
        while not self._trackers[turn].done:
            try:
                self._trackers[turn].wait(_CHECK_INTERVAL_MS / 1000)
            except zmq.NotDone:
                if not self._is_connected():
                    raise self._lost() from None
        self._pending_bytes = num_bytes
        return self._out_2B[turn][:num_bytes]

    def send(self) -> None:
        turn = self._num_sent % NUM_BUFFERS
        try:
            tracker = self._pair.send(self._out_views[turn][: self._pending_bytes], zmq.NOBLOCK, copy=False, track=True)
        except zmq.Again:
            raise self._lost() from None
        assert tracker is not None
        self._trackers[turn] = tracker
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._in_B.numel())
        check_agreement(num_bytes, self._receive())
        self.bytes_received += num_bytes
        return self._in_B[:num_bytes]

    def release(self) -> None:
        pass  # zmq queues later messages

    def close(self) -> None:
        """Waits until the kernel has taken what was sent."""
        if self._pair.closed:
            return
        if self._monitor is not None:
            self._pair.disable_monitor()
            self._monitor.close()
        self._pair.close(_LINGER_MS)
        self._pair.context.term()

    def _receive(self) -> int:
        """Waits for the next message and returns its size."""
        is_connected = True
        while True:
            try:
                return self._pair.recv_into(self._in_view)
            except zmq.Again:
                if not is_connected:  # and no message had arrived before the loss
                    raise self._lost() from None
                is_connected = self._is_connected()

    def _is_connected(self) -> bool:
        """Whether the peer is connected: the listening end can send; the other end, which reconnects, has a monitor."""
        if self._monitor is None:
            return bool(self._pair.poll(0, zmq.POLLOUT))
        return not self._monitor.poll(0)

    def _lost(self) -> ConnectionError:
        return ConnectionError(f"the connection to rank {self._peer_rank} was lost.")


# --- opening ---------------------------------------------------------------------------------------------------------


class Offer(msgspec.Struct):
    endpoint: str
    token: bytes
    limits: tuple[int, int]


def open_tcp(end: LinkEnd, address: str, pinned: bool = False) -> TcpLink:
    """Opens one end. The primary listens on its `address` (never on all interfaces), on a free port.

    TimeoutError if the peer does not connect, ConnectionError if it cannot be reached, within the end's timeout;
    ValueError if `address` is not one of this host.
    """
    return _accept(end, address, pinned) if end.is_primary else _connect(end, pinned)


def _accept(end: LinkEnd, address: str, pinned: bool) -> TcpLink:
    """The primary's end, once the worker has connected."""
    pair = _make_pair(end.max_recv_bytes)
    with pair.context.socket(zmq.REP) as authenticator:
        authenticator.bind(_ZAP_ENDPOINT)
        offer = Offer(_listen(pair, address), secrets.token_hex(16).encode(), end.limits)
        end.rendezvous.set(f"{end.key}/tcp", msgspec.msgpack.encode(offer))
        if not _authenticate(pair, authenticator, offer.token, end.timeout):
            raise TimeoutError(
                f"rank {end.peer_rank} did not connect to {offer.endpoint} within {end.timeout:g} s; check that it "
                f"runs and that no firewall is in between."
            )
    return TcpLink(pair, end.peer_rank, end.max_send_bytes, end.max_recv_bytes, pinned)


def _connect(end: LinkEnd, pinned: bool) -> TcpLink:
    """The worker's end, connected to the primary."""
    offer = msgspec.msgpack.decode(end.rendezvous.get(f"{end.key}/tcp", end.timeout), type=Offer)
    assert offer.limits == end.limits, f"the ends of {end.key} plan messages of {offer.limits} and {end.limits} bytes"
    pair = _make_pair(end.max_recv_bytes)
    monitor = pair.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    pair.plain_username, pair.plain_password = b"hetis", offer.token
    pair.ipv6 = "[" in offer.endpoint
    pair.connect(offer.endpoint)
    is_reached = bool(monitor.poll(int(1000 * end.timeout)))
    if not is_reached or recv_monitor_message(monitor)["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
        raise ConnectionError(f"rank {end.peer_rank} at {offer.endpoint} cannot be reached; check its address.")
    return TcpLink(pair, end.peer_rank, end.max_send_bytes, end.max_recv_bytes, pinned, monitor)


def _make_pair(max_recv_bytes: int) -> zmq.Socket[bytes]:
    """Socket with a context, hence a thread, of its own, so that closing waits only for messages of this link."""
    pair = zmq.Context().socket(zmq.PAIR)
    pair.copy_threshold = ZERO_COPY_BYTES
    for option, value in (
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, _MAX_UNREAD),
        (zmq.RCVTIMEO, _CHECK_INTERVAL_MS),
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, max(max_recv_bytes, _MAX_HANDSHAKE_BYTES)),
        # No TCP_MAXRT: it would also end the connection to a peer that is stopped for a while.
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_SECONDS),
        (zmq.TCP_KEEPALIVE_INTVL, 1),
        (zmq.TCP_KEEPALIVE_CNT, 5),
    ):
        pair.setsockopt(option, value)
    return pair


def _listen(pair: zmq.Socket[bytes], address: str) -> str:
    try:
        host = str(socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][4][0])
        if ipaddress.ip_address(host).is_unspecified:
            raise OSError("it means all interfaces")
        pair.ipv6, pair.plain_server = ":" in host, True
        pair.bind(f"tcp://[{host}]:0" if pair.ipv6 else f"tcp://{host}:0")
    except (OSError, zmq.ZMQError) as error:
        raise ValueError(f"cannot listen on {address} ({error}); give an address of this host.") from None
    return pair.getsockopt_string(zmq.LAST_ENDPOINT)


def _authenticate(pair: zmq.Socket[bytes], authenticator: zmq.Socket[bytes], token: bytes, timeout: float) -> bool:
    """Answers authentication requests until a peer with the token is connected; False if none is in time."""
    deadline = time.monotonic() + timeout
    poller = zmq.Poller()
    poller.register(authenticator, zmq.POLLIN)
    poller.register(pair, zmq.POLLOUT)  # a pair can send once it has a peer
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poller.poll(1 + int(1000 * left)))
        if pair in ready:
            return True
        if authenticator in ready:
            version, request, *_, password = authenticator.recv_multipart()
            status = _ZAP_ACCEPTED if secrets.compare_digest(password, token) else _ZAP_REFUSED
            authenticator.send_multipart([version, request, status, b"", b"", b""])
    return False
