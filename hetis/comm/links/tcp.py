"""Link between processes of different hosts: a zmq PAIR over TCP.

A peer must show a token that went over the rendezvous: zmq's PLAIN handshake, judged by the listening end.
Large messages go out of their slot without a copy; on receiving there is one, into an aligned buffer. Waiting with the
core does not pay: zmq's thread needs it. That thread takes in some messages ahead of the reader, so a sender mostly
waits for its slots to leave this host only; what small messages it has copied there is bounded by the plan alone.
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

from hetis.comm.links.base import NUM_SLOTS, Link, check_agreement, check_size
from hetis.comm.rendezvous import Rendezvous

ZERO_COPY_BYTES = 512 * 1024  # below, zmq's copy costs less than the thread that learns when a slot is free again
_LOOK_AROUND_MS = 100  # longest wait before the peer's life is looked at
_LINGER_MS = 2000  # for the peer to take what is left of a message when this end closes
_MOST_WAITING = 8  # messages unread at an end before TCP holds the sender back
_KEEPALIVE_SECONDS = 5  # of silence before the kernel asks whether the other host still runs, five times
_LARGEST_GREETING = 1024  # bytes, of zmq's own handshake
_GATE = "inproc://zeromq.zap.01"  # where zmq asks whom to let in (rfc.zeromq.org/spec/27)


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
        """Owns `pair` and its context from now on. `pinned`: page-locked buffers. `monitor`: readable after the end."""
        self._pair, self._peer_rank, self._monitor = pair, peer_rank, monitor
        self._out_2B = [torch.empty(max_send_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(NUM_SLOTS)]
        self._out_views = [slot_B.numpy().data for slot_B in self._out_2B]
        self._in_B = torch.empty(max_recv_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._in_view = self._in_B.numpy().data
        self._leaving = [zmq.MessageTracker() for _ in range(NUM_SLOTS)]  # done once zmq needs the slot no more
        self._num_sent, self._pending_bytes = 0, 0

    def send_buffer(self, num_bytes: int) -> Tensor:
        turn = self._num_sent % NUM_SLOTS
        check_size(num_bytes, self._out_2B[turn].numel())
        while not self._leaving[turn].done:
            try:
                self._leaving[turn].wait(_LOOK_AROUND_MS / 1000)
            except zmq.NotDone:
                if not self._is_connected():
                    raise self._lost() from None
        self._pending_bytes = num_bytes
        return self._out_2B[turn][:num_bytes]

    def send(self) -> None:
        turn = self._num_sent % NUM_SLOTS
        try:
            tracker = self._pair.send(self._out_views[turn][: self._pending_bytes], zmq.NOBLOCK, copy=False, track=True)
        except zmq.Again:
            raise self._lost() from None
        assert tracker is not None
        self._leaving[turn] = tracker
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._in_B.numel())
        check_agreement(num_bytes, self._receive())
        self.bytes_received += num_bytes
        return self._in_B[:num_bytes]

    def release(self) -> None:
        pass  # zmq holds what comes meanwhile

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
        """Waits for the next message; its size."""
        is_connected = True
        while True:
            try:
                return self._pair.recv_into(self._in_view)
            except zmq.Again:
                if not is_connected:  # and nothing had come before the end
                    raise self._lost() from None
                is_connected = self._is_connected()

    def _is_connected(self) -> bool:
        """The listening end can send while it has a peer; the other one would connect again, but has its monitor."""
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

    TimeoutError if the peer does not come, ConnectionError if it cannot be reached within `timeout` seconds;
    ValueError if `address` is not one of this host.
    """
    if is_primary:
        pair = _pair(limits[1])
        with pair.context.socket(zmq.REP) as gate:
            gate.bind(_GATE)
            offer = Offer(_listen(pair, address), secrets.token_hex(16).encode(), limits)
            rendezvous.set(f"{key}/tcp", msgspec.msgpack.encode(offer))
            if not _admit(pair, gate, offer.token, timeout):
                raise TimeoutError(f"rank {peer_rank} did not come to {offer.endpoint} within {timeout:g} s.")
        return TcpLink(pair, peer_rank, limits[0], limits[1], pinned)
    offer = msgspec.msgpack.decode(rendezvous.get(f"{key}/tcp", timeout), type=Offer)
    assert offer.limits == limits, f"the ends of {key} plan messages of {offer.limits} and {limits} bytes"
    pair = _pair(limits[0])
    monitor = _connect(pair, offer, timeout)
    if monitor is None:
        raise ConnectionError(f"rank {peer_rank} at {offer.endpoint} cannot be reached: is its address right?")
    return TcpLink(pair, peer_rank, limits[1], limits[0], pinned, monitor)


def _pair(max_recv_bytes: int) -> zmq.Socket[bytes]:
    """A socket in a context, hence with a thread, of its own: closing waits for what this link has sent, no more."""
    pair = zmq.Context().socket(zmq.PAIR)
    pair.copy_threshold = ZERO_COPY_BYTES
    for option, value in (
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, _MOST_WAITING),
        (zmq.RCVTIMEO, _LOOK_AROUND_MS),
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, max(max_recv_bytes, _LARGEST_GREETING)),
        # No TCP_MAXRT: it would also end the connection to a peer that is merely stopped for a while.
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
        raise ValueError(f"cannot listen on {address} ({error}): give an address of this host.") from None
    return pair.getsockopt_string(zmq.LAST_ENDPOINT)


def _admit(pair: zmq.Socket[bytes], gate: zmq.Socket[bytes], token: bytes, timeout: float) -> bool:
    """Lets in a peer that shows the token. One has come."""
    deadline = time.monotonic() + timeout
    poller = zmq.Poller()
    poller.register(gate, zmq.POLLIN)
    poller.register(pair, zmq.POLLOUT)  # it can send once it has a peer
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poller.poll(1 + int(1000 * left)))
        if pair in ready:
            return True
        if gate in ready:
            version, request, *_, shown = gate.recv_multipart()
            verdict = b"200" if secrets.compare_digest(shown, token) else b"400"
            gate.send_multipart([version, request, verdict, b"", b"", b""])
    return False


def _connect(pair: zmq.Socket[bytes], offer: Offer, timeout: float) -> zmq.Socket[bytes] | None:
    """The monitor of the connection, which will tell of its end; None if the other end did not let us in."""
    monitor = pair.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    pair.plain_username, pair.plain_password = b"hetis", offer.token
    pair.ipv6 = "[" in offer.endpoint
    pair.connect(offer.endpoint)
    if monitor.poll(int(1000 * timeout)) and recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        return monitor
    return None
