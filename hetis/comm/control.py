"""The control plane: typed messages over zmq, one ROUTER per kind of client at the driver, one DEALER at each client.

Unix sockets in a private directory inside a host, one configured address between hosts. Once everyone has connected
the socket files are removed (`ControlServer.hide`): established connections stay, and no other process can connect.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from hetis.core import messages as m
from hetis.core.config import Endpoints
from hetis.processes import supervision

Client = Literal["ranks", "health", "front"]

_FROM_RANK = m.Hello | m.Ready | m.Measured | m.StepResult | m.StepTimes | m.Stats | m.Failure | m.Heartbeat
_TO_RANK = m.Setup | m.Measure | m.MeasureLink | m.StepCommand | m.StatsQuery | m.Shutdown | m.Abort | m.Pong
_FROM_FRONT = m.Attach | m.AddRequest | m.AbortRequest | m.FleetQuery | m.ProfileQuery | m.Shutdown
_TO_FRONT = m.Measuring | m.EngineReady | m.Outputs | m.FleetStats | m.ProfileReport | m.Refused | m.EngineDead

MAX_MESSAGE_BYTES = 1 << 30
RECONNECT_MILLISECONDS = 10  # clients start before the driver listens
HEARTBEAT_SECONDS = 0.25
VERDICT_SECONDS = 5.0  # a rank that must end waits so long for the driver to say why
TOLD_TO_END = "was told to end by its launcher"

_encoder = msgspec.msgpack.Encoder()


def encode(message: m.Message) -> bytes:
    return _encoder.encode(message)


class ControlServer:
    """The driver's end of all control sockets."""

    def __init__(self, run_directory: str, address: str | None) -> None:
        """Binds. `address`: the interface for ranks on other hosts, on free ports; None: unix sockets only."""
        self._context = zmq.Context()
        self._directory = Path(run_directory)
        self._sockets: dict[Client, zmq.Socket[bytes]] = {}
        self._decoders: dict[Client, msgspec.msgpack.Decoder[Any]] = {
            "ranks": msgspec.msgpack.Decoder(_FROM_RANK),
            "health": msgspec.msgpack.Decoder(_FROM_RANK),
            "front": msgspec.msgpack.Decoder(_FROM_FRONT),
        }
        self.poller = zmq.Poller()
        places: dict[str, str] = {}
        clients: tuple[Client, ...] = ("ranks", "health", "front")
        for client in clients:
            socket = self._context.socket(zmq.ROUTER)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            places[client] = self._bind(socket, client, address)
            self._sockets[client] = socket
            self.poller.register(socket, zmq.POLLIN)
        self.endpoints = Endpoints(**places)

    def _bind(self, socket: "zmq.Socket[bytes]", client: Client, address: str | None) -> str:
        if address is None or client == "front":
            endpoint = f"ipc://{self._directory / client}"
            socket.bind(endpoint)
            return endpoint
        host = f"[{address}]" if ":" in address else address
        socket.setsockopt(zmq.IPV6, int(":" in address))
        port = socket.bind_to_random_port(f"tcp://{host}")
        return f"tcp://{host}:{port}"

    def hide(self) -> None:
        """Removes the socket files; what is connected stays connected."""
        clients: tuple[Client, ...] = ("ranks", "health", "front")
        for client in clients:
            (self._directory / client).unlink(missing_ok=True)

    def receive(self, client: Client) -> tuple[bytes, Any] | None:
        """The next message of one kind of client, with the sender's identity; None if there is none now.

        Frames that are no message are dropped, so that they cannot stop the others; a front end is answered `Refused`.
        """
        while True:
            try:
                frames = self._sockets[client].recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) != 2:
                continue
            try:
                return frames[0], self._decoders[client].decode(frames[1])
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                if client == "front":
                    self.send(client, frames[0], m.Refused(reason=f"this is no message of a front end: {error}"))

    def send(self, client: Client, identity: bytes, message: m.Message | bytes) -> None:
        payload = message if isinstance(message, bytes) else encode(message)
        self._sockets[client].send_multipart([identity, payload])

    def close(self) -> None:
        self.hide()
        self._context.destroy(linger=1000)


class ControlClient:
    """A rank's or a front end's end. Used by one thread."""

    def __init__(self, endpoint: str, identity: str, side: Literal["rank", "front"]) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity.encode())
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._losses = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(endpoint)
        union: Any = _TO_RANK if side == "rank" else _TO_FRONT
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)

    @property
    def is_lost(self) -> bool:
        """Whether there was a connection and the driver's end of it closed: it ended, however that happened."""
        return bool(self._losses.poll(0))

    def send(self, message: m.Message | bytes) -> None:
        """`bytes`: encoded already."""
        self.socket.send(message if isinstance(message, bytes) else encode(message))

    def waiter(self, *others: int, until_lost: bool) -> Callable[[float | None], object]:
        """A function that returns when there is something to receive, one of the `others` (descriptors) is readable or,
        with `until_lost`, the connection is lost; at the latest after as many seconds as it is given."""
        poller = zmq.Poller()
        for each in (self.socket, *others, *((self._losses,) if until_lost else ())):
            poller.register(each, zmq.POLLIN)
        return lambda seconds: poller.poll(None if seconds is None else int(1000 * seconds))

    def receive(self, timeout: float | None = None) -> Any:
        """The next message; None after `timeout` seconds."""
        if not self.socket.poll(None if timeout is None else int(timeout * 1000)):
            return None
        return self._decoder.decode(self.socket.recv())

    def close(self, linger: float = 1.0) -> None:
        """`linger`: seconds that unsent messages may take."""
        self.socket.disable_monitor()
        self._losses.close()
        self._context.destroy(linger=int(1000 * linger))


class Heart(threading.Thread):
    """A rank's sign of life, on a socket of its own so that a long step does not silence it, and the rank's end.

    Whatever ends a rank before its time goes through here, and ends the process: `Abort` from the driver, a driver
    that is gone or silent for `timeout` seconds, a failure of the rank itself (`report`), a signal of its launcher.
    In the last two cases it waits a little for the driver's verdict, so that the first explanation is also the last
    line. A stopped process (SIGSTOP) cannot end itself, so other ranks on its host do it.
    """

    def __init__(
        self,
        endpoint: str,
        rank: int,
        waker: supervision.Waker,
        on_lost_driver: Callable[[str], None],
        prints_verdict: bool = False,
    ) -> None:
        """`on_lost_driver` is told how the driver was lost. `prints_verdict`: no other process of this host does."""
        super().__init__(name="heart", daemon=True)
        self._endpoint, self._rank, self._waker = endpoint, rank, waker
        self._on_lost_driver, self._prints_verdict = on_lost_driver, prints_verdict
        self.timeout = 120.0  # until Setup says otherwise
        self.host = supervision.host_id()  # until it is proven
        self.step = -1
        self._stopping = threading.Event()
        self._failures: queue.SimpleQueue[m.Failure] = queue.SimpleQueue()
        self._deadline: float | None = None  # of the verdict, once this rank must end
        self._last_answer = 0.0

    def report(self, failure: m.Failure) -> None:
        """Hands a failure of this rank to the driver, from any thread. The process ends soon after."""
        self._failures.put(failure)
        self._waker.wake()

    def stop(self) -> None:
        """In good order: this rank has done its work."""
        self._stopping.set()
        self._waker.wake()
        self.join()

    def run(self) -> None:
        client = ControlClient(self._endpoint, str(self._rank), "rank")
        poller = zmq.Poller()
        poller.register(client.socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        self._last_answer = next_beat = time.monotonic()
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= next_beat:
                client.send(m.Heartbeat(rank=self._rank, step=self.step))
                next_beat = now + HEARTBEAT_SECONDS
            poller.poll(max(0, int((next_beat - now) * 1000)))
            self._read(client)
            self._report_own(client)
            self._check(client)
        client.close(linger=0)

    def _read(self, client: ControlClient) -> None:
        while (message := client.receive(0)) is not None:
            self._last_answer = time.monotonic()
            if isinstance(message, m.Abort):
                if message.host == self.host:
                    supervision.kill(pid for pid in message.culprits if pid != os.getpid())
                self._end(message.reason)

    def _report_own(self, client: ControlClient) -> None:
        """Reports of this process: a failure, or that its launcher wants it to end."""
        if any(self._waker.drain()):
            client.send(m.Failure(rank=self._rank, reason=TOLD_TO_END, is_consequence=True))
            self._deadline = self._deadline or time.monotonic() + VERDICT_SECONDS
        with suppress(queue.Empty):
            client.send(self._failures.get_nowait())
            self._deadline = self._deadline or time.monotonic() + VERDICT_SECONDS

    def _check(self, client: ControlClient) -> None:
        now = time.monotonic()
        if self._deadline is not None and now > self._deadline:
            os._exit(1)
        if client.is_lost and not self._stopping.is_set():
            self._on_lost_driver("ended")
            self._end("the driver ended.")
        if now - self._last_answer > self.timeout:
            how = f"has not answered for {self.timeout:g} s (stopped, or its host is gone)"
            self._on_lost_driver(how)
            self._end(f"the driver {how}.")

    def _end(self, reason: str) -> None:
        supervision.report_to_torchrun(reason)
        if self._prints_verdict:
            print(f"hetis: {reason}", file=sys.stderr, flush=True)
        os._exit(1)
