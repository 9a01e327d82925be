"""The control plane: typed messages over zmq, one ROUTER per kind of client at the driver, one DEALER at each client.

Within a host they use unix sockets in a private directory, between hosts one configured address.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from hetis.core import messages as m
from hetis.core.config import Endpoints

Client = Literal["ranks", "health", "board", "agents", "front"]
CLIENTS: tuple[Client, ...] = ("ranks", "health", "board", "agents", "front")  # the first three are of each rank

_FROM_FRONT: Any = m.Attach | m.Detach | m.AddRequest | m.AbortRequest | m.FleetQuery | m.ProfileQuery
_FROM_FRONT |= m.StatusQuery | m.FleetSnapshotQuery
_FROM: dict[Client, Any] = {
    "ranks": m.Hello | m.Ready | m.Measured | m.StepResult | m.StepTimes | m.Stats,
    "health": m.Failure | m.Heartbeat,
    "board": m.Publish | m.LookUp,
    "agents": m.AgentHello | m.RankEnded | m.AskedToEnd | m.Ping,
    "front": _FROM_FRONT,
}
_TO_FRONT: Any = m.Measuring | m.EngineReady | m.Outputs | m.FleetStats | m.ProfileReport | m.Refused
_TO_FRONT |= m.EndRequested | m.EngineDead | m.EngineStatus | m.FleetSnapshot
_TO: dict[Client, Any] = {
    "ranks": m.Setup | m.Measure | m.MeasureLink | m.StepCommand | m.StatsQuery | m.Shutdown,
    "health": None,  # nothing is sent
    "board": m.Published,
    "agents": m.Pong | m.End,
    "front": _TO_FRONT,
}

MAX_MESSAGE_BYTES = 1 << 30
MAX_FRONT_BYTES = 32 << 20  # of a message of a front end: several million tokens; the driver decodes it in 0.3 s
RECONNECT_MILLISECONDS = 10  # clients start before the driver listens
LINGER_SECONDS = 1.0  # that messages may take to be sent when a socket is closed

_encoder = msgspec.msgpack.Encoder()


def encode(message: m.Message) -> bytes:
    return _encoder.encode(message)


class ControlServer:
    """The driver's end of all control sockets."""

    def __init__(self, run_directory: str, address: str | None) -> None:
        """Binds. `address`: the interface to which ranks on other hosts connect, on free ports; None: unix sockets."""
        self._context = zmq.Context()
        self._directory = Path(run_directory)
        self._sockets: dict[Client, zmq.Socket[bytes]] = {}
        self._decoders = {client: msgspec.msgpack.Decoder(union) for client, union in _FROM.items()}
        self.poller = zmq.Poller()
        endpoints: dict[str, str] = {}
        for client in CLIENTS:
            socket = self._context.socket(zmq.ROUTER)
            _set_limits(socket)
            endpoints[client] = self._bind(socket, client, address)
            self._sockets[client] = socket
            self.poller.register(socket, zmq.POLLIN)
        self.endpoints = Endpoints(**endpoints)

    def _bind(self, socket: "zmq.Socket[bytes]", client: Client, address: str | None) -> str:
        if address is None or client == "front":
            endpoint = f"ipc://{self._directory / client}"
            socket.bind(endpoint)
            return endpoint
        host = f"[{address}]" if ":" in address else address
        socket.setsockopt(zmq.IPV6, int(":" in address))
        port = socket.bind_to_random_port(f"tcp://{host}")
        return f"tcp://{host}:{port}"

    def receive(self, client: Client) -> tuple[bytes, Any] | None:
        """(identity, message) of the next message from one kind of client; None if none has come.

        Frames that are no message are dropped, so that they cannot harm other clients; a front end gets `Refused`.
        """
        while True:
            try:
                identity, *frames = self._sockets[client].recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                return identity, self._decode(client, frames)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                if client == "front":
                    self.send(client, identity, m.Refused(reason=f"this is no message of a front end: {error}"))

    def _decode(self, client: Client, frames: list[bytes]) -> Any:
        """Raises MsgspecError, ValueError (UnicodeDecodeError is one) or RecursionError for what is no message."""
        if len(frames) != 1:
            raise ValueError(f"it has {len(frames)} frames, not 1.")
        if client == "front" and len(frames[0]) > MAX_FRONT_BYTES:
            raise ValueError(f"it has {len(frames[0])} bytes, more than {MAX_FRONT_BYTES}.")
        return self._decoders[client].decode(frames[0])

    def send(self, client: Client, identity: bytes, message: m.Message | bytes) -> None:
        payload = message if isinstance(message, bytes) else encode(message)
        self._sockets[client].send_multipart([identity, payload])

    def close(self) -> None:
        self._context.destroy(linger=int(1000 * LINGER_SECONDS))


class ControlClient:
    """A rank's, an agent's or a front end's end of one control socket. For one thread."""

    def __init__(self, endpoint: str, identity: str, client: Client) -> None:
        self._context = zmq.Context()
        self.socket = _dealer(self._context, identity)
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._losses = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(endpoint)
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_TO[client])

    @property
    def is_lost(self) -> bool:
        """Whether there was a connection and the driver's end of it has closed: the driver has ended."""
        return bool(self._losses.poll(0))

    def send(self, message: m.Message | bytes) -> None:
        """`message`: as bytes, it is encoded already."""
        self.socket.send(message if isinstance(message, bytes) else encode(message))

    def waiter(self, *others: int, until_lost: bool) -> Callable[[float | None], object]:
        """A function that waits, at most as many seconds as it is given (None: without limit).

        It returns when there is a message, when one of the descriptors `others` is readable, or, with `until_lost`,
        when the connection is lost.
        """
        poller = zmq.Poller()
        for each in (self.socket, *others, *((self._losses,) if until_lost else ())):
            poller.register(each, zmq.POLLIN)
        return lambda seconds: poller.poll(None if seconds is None else int(1000 * seconds))

    def receive(self, timeout: float | None = None) -> Any:
        """The next message; None after `timeout` seconds."""
        if not self.socket.poll(None if timeout is None else int(timeout * 1000)):
            return None
        return self._decoder.decode(self.socket.recv())

    def close(self, linger: float = LINGER_SECONDS) -> None:
        """`linger`: seconds that messages may take to be sent."""
        self.socket.disable_monitor()
        self._losses.close()
        self._context.destroy(linger=int(1000 * linger))


class FrontClient:
    """A front end's end of the control plane, for an event loop: no call but `close` waits.

    `fileno()` is edge-triggered: when it is readable, and after every `send`, call `receive` until it returns None.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        """Connects to the socket in the run directory, at once or as soon as the driver listens."""
        self._context = zmq.Context()
        self._socket = _dealer(self._context, identity)
        self._socket.connect(f"ipc://{directory / 'front'}")
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_TO_FRONT)

    @staticmethod
    def encode(message: m.Message) -> bytes:
        """Raises ValueError for a message that the driver would refuse for its size."""
        payload = encode(message)
        if len(payload) > MAX_FRONT_BYTES:
            raise ValueError(f"a request takes {len(payload)} bytes, more than {MAX_FRONT_BYTES}; shorten the prompt.")
        return payload

    def fileno(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, payload: bytes) -> None:
        self._socket.send(payload, zmq.NOBLOCK)

    def receive(self) -> Any:
        """The next message; None if none has come."""
        try:
            return self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self, linger: float = LINGER_SECONDS) -> None:
        """`linger`: seconds that messages may take to be sent."""
        self._context.destroy(linger=int(1000 * linger))


def _dealer(context: "zmq.Context[zmq.Socket[bytes]]", identity: str) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.DEALER)
    _set_limits(socket)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS)
    return socket


def _set_limits(socket: "zmq.Socket[bytes]") -> None:
    """Messages of a limited size, queues without limit: a slow reader must not block the driver."""
    socket.setsockopt(zmq.LINGER, int(1000 * LINGER_SECONDS))
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
