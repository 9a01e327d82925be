"""Link between processes of different hosts: zmq over TCP.

Both ends are ROUTER sockets and call each other by a token that went over the rendezvous: what comes under another
name is dropped. Messages go out without a copy from `ZERO_COPY_BYTES` on, and are copied once on receiving. zmq's own
thread takes what comes, so neither end waits for the other, except for a slot that has not left this host.
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
_KEEPALIVE_SECONDS = 5  # of silence before the kernel asks whether the other host still runs, five times
_LARGEST_GREETING = 1024  # bytes, of zmq's own handshake
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED


class TcpLink(Link):
    kind = "tcp"

    def __init__(
        self,
        router: zmq.Socket[bytes],
        token: bytes,
        descriptor: int,
        peer_rank: int,
        max_send_bytes: int,
        max_recv_bytes: int,
        pinned: bool = False,
    ) -> None:
        """Owns `router` from now on, whose connection to the peer is `descriptor`. `pinned`: page-locked buffers."""
        self._router, self._monitor = router, router.get_monitor_socket()
        self._token, self._descriptor, self._peer_rank = token, descriptor, peer_rank
        self._out = [torch.empty(max_send_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(NUM_SLOTS)]
        self._in = torch.empty(max_recv_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._in_view = self._in.numpy().data
        self._trackers = [zmq.MessageTracker() for _ in range(NUM_SLOTS)]
        self._num_sent, self._pending_bytes, self._is_lost = 0, 0, False

    def send_buffer(self, num_bytes: int) -> Tensor:
        turn = self._num_sent % NUM_SLOTS
        check_size(num_bytes, self._out[turn].numel())
        while not self._trackers[turn].done:
            self._look_around()
            try:
                self._trackers[turn].wait(_LOOK_AROUND_MS / 1000)
            except zmq.NotDone:
                if self._is_lost:
                    raise self._lost() from None
        self._pending_bytes = num_bytes
        return self._out[turn][:num_bytes]

    def send(self) -> None:
        turn = self._num_sent % NUM_SLOTS
        message = self._out[turn][: self._pending_bytes].numpy().data
        try:
            self._router.send(self._token, zmq.SNDMORE)
            tracker = self._router.send(message, copy=False, track=True)
        except zmq.ZMQError:
            raise self._lost() from None
        assert tracker is not None
        self._trackers[turn] = tracker
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._in.numel())
        while not self._has_message():
            if self._is_lost:
                raise self._lost()
            self._look_around()
        check_agreement(num_bytes, self._router.recv_into(self._in_view))
        self.bytes_received += num_bytes
        return self._in[:num_bytes]

    def release(self) -> None:
        pass  # zmq holds what comes meanwhile

    def close(self) -> None:
        """Waits until the kernel has taken what was sent, which the monitor's end tells."""
        if self._router.closed:
            return
        self._router.close(_LINGER_MS)
        while self._monitor.poll(2 * _LINGER_MS):
            if recv_monitor_message(self._monitor)["event"] == zmq.EVENT_MONITOR_STOPPED:
                break
        self._monitor.close()

    def _has_message(self) -> bool:
        """Waits a while for the name above the peer's next message."""
        try:
            while self._router.recv() != self._token:
                self._router.recv_multipart()
        except zmq.Again:
            return False
        return True

    def _look_around(self) -> None:
        """What has happened to the connection; a message that came before its end is still found after this."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if (event["event"], event["value"]) == (zmq.EVENT_DISCONNECTED, self._descriptor):
                self._is_lost = True

    def _lost(self) -> ConnectionError:
        return ConnectionError(f"the connection to rank {self._peer_rank} was lost.")


# --- opening ---------------------------------------------------------------------------------------------------------


class _Offer(msgspec.Struct):
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

    TimeoutError or ConnectionError if the peer does not come, or cannot be reached, within `timeout` seconds;
    ValueError if `address` is not one of this host.
    """
    if is_primary:
        router = _router(limits[1])
        offer = _Offer(_listen(router, address), secrets.token_hex(16).encode(), limits)
        rendezvous.set(f"{key}/tcp", msgspec.msgpack.encode(offer))
        descriptor = _accept(router, offer, peer_rank, timeout)
        return TcpLink(router, offer.token, descriptor, peer_rank, limits[0], limits[1], pinned)
    offer = msgspec.msgpack.decode(rendezvous.get(f"{key}/tcp", timeout), type=_Offer)
    assert offer.limits == limits, f"the ends of {key} plan messages of {offer.limits} and {limits} bytes"
    router = _router(limits[0])
    descriptor = _connect(router, offer, peer_rank, timeout)
    return TcpLink(router, offer.token, descriptor, peer_rank, limits[1], limits[0], pinned)


def _router(max_recv_bytes: int) -> zmq.Socket[bytes]:
    """A socket that does not wait to send, waits a while to receive, and says when a connection ends."""
    router = zmq.Context.instance().socket(zmq.ROUTER)  # one context with one thread for all links of this process
    router.get_monitor_socket(_EVENTS | zmq.EVENT_MONITOR_STOPPED)
    router.copy_threshold = ZERO_COPY_BYTES
    for option, value in (
        (zmq.ROUTER_MANDATORY, 1),  # sending to a peer that is gone is an error
        (zmq.RECONNECT_IVL, -1),  # what was lost with a connection stays lost
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, 0),
        (zmq.RCVTIMEO, _LOOK_AROUND_MS),
        (zmq.MAXMSGSIZE, max(max_recv_bytes, _LARGEST_GREETING)),
        (zmq.LINGER, 0),
        # No TCP_MAXRT: it would also end the connection to a peer that is merely stopped for a while.
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_SECONDS),
        (zmq.TCP_KEEPALIVE_INTVL, 1),
        (zmq.TCP_KEEPALIVE_CNT, 5),
    ):
        router.setsockopt(option, value)
    return router


def _listen(router: zmq.Socket[bytes], address: str) -> str:
    try:
        host = str(socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][4][0])
        if ipaddress.ip_address(host).is_unspecified:
            raise OSError("it means all interfaces")
        router.ipv6 = ":" in host
        router.bind(f"tcp://[{host}]:0" if router.ipv6 else f"tcp://{host}:0")
    except OSError as error:  # zmq's are among them
        raise ValueError(f"cannot listen on {address} ({error}): give an address of this host.") from None
    return router.getsockopt_string(zmq.LAST_ENDPOINT)


def _accept(router: zmq.Socket[bytes], offer: _Offer, peer_rank: int, timeout: float) -> int:
    """Waits for the peer's greeting; the descriptor that it came over."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            name, *frames = router.recv_multipart(copy=False)
        except zmq.Again:
            continue
        if secrets.compare_digest(name.bytes, offer.token):
            monitor = router.get_monitor_socket()
            while monitor.poll(0):  # connections of others that ended before
                recv_monitor_message(monitor)
            return int(frames[0].get(zmq.SRCFD))
    raise TimeoutError(f"rank {peer_rank} did not connect to {offer.endpoint} within {timeout:g} s.")


def _connect(router: zmq.Socket[bytes], offer: _Offer, peer_rank: int, timeout: float) -> int:
    """Greets the primary; the descriptor of the connection."""
    router.setsockopt(zmq.ROUTING_ID, offer.token)
    router.setsockopt(zmq.CONNECT_ROUTING_ID, offer.token)
    router.ipv6 = "[" in offer.endpoint
    router.connect(offer.endpoint)
    router.send_multipart([offer.token, b""])
    monitor = router.get_monitor_socket()
    if monitor.poll(int(1000 * timeout)):
        event = recv_monitor_message(monitor)
        if event["event"] == zmq.EVENT_CONNECTED:
            return event["value"]
    raise ConnectionError(f"rank {peer_rank} at {offer.endpoint} cannot be reached: is its address right?")
