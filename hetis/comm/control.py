"""The control plane: typed messages over zmq, one ROUTER per kind of client at the driver, one DEALER at each client.

Unix sockets in a private directory inside a host, one configured address between hosts. Once everyone has connected the
socket files are removed (`ControlServer.hide`): established connections stay, nobody else can join, nothing is left over.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from hetis.comm import supervision
from hetis.core import messages as m
from hetis.core.config import Endpoints

Client = Literal["ranks", "health", "front"]

_FROM_RANK = m.Hello | m.Ready | m.StepResult | m.Stats | m.Failure | m.Heartbeat
_TO_RANK = m.Setup | m.StepCommand | m.StatsQuery | m.Shutdown | m.Abort | m.Pong
_FROM_FRONT = m.Attach | m.AddRequest | m.AbortRequest | m.FleetQuery | m.Shutdown
_TO_FRONT = m.EngineReady | m.Outputs | m.FleetStats | m.EngineDead

MAX_MESSAGE_BYTES = 1 << 30
HEARTBEAT_SECONDS = 0.25

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

        A frame that is no message of ours is dropped: nobody but our own processes can connect, and if one could, its
        garbage must not stop the others.
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
            except msgspec.MsgspecError:
                continue

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
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._socket.connect(endpoint)
        union: Any = _TO_RANK if side == "rank" else _TO_FRONT
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)

    def send(self, message: m.Message) -> None:
        self._socket.send(encode(message))

    def receive(self, timeout: float | None = None) -> Any:
        """The next message; None after `timeout` seconds."""
        if not self._socket.poll(None if timeout is None else int(timeout * 1000)):
            return None
        return self._decoder.decode(self._socket.recv())

    def close(self) -> None:
        self._context.destroy(linger=1000)


class Heart(threading.Thread):
    """A rank's sign of life, on a socket of its own so that a long step does not silence it.

    Ends the process when the driver says `Abort` or stays silent longer than `timeout` seconds. A stopped process
    (SIGSTOP) cannot end itself, so neighbours on its host do it.
    """

    def __init__(self, endpoint: str, rank: int, on_silence: Callable[[str], None]) -> None:
        super().__init__(name="heart", daemon=True)
        self._endpoint, self._rank, self._on_silence = endpoint, rank, on_silence
        self.timeout = 120.0  # until Setup says otherwise
        self.step = -1
        self._ending = threading.Event()
        self._last_words: queue.SimpleQueue[m.Failure] = queue.SimpleQueue()
        self._heard = threading.Event()

    def report(self, failure: m.Failure) -> None:
        """Hand a failure to the driver, from any thread; returns when it is on its way."""
        self._last_words.put(failure)
        self._heard.wait(timeout=5.0)

    def run(self) -> None:
        client = ControlClient(self._endpoint, str(self._rank), "rank")
        last_word = time.monotonic()
        while not self._ending.is_set():
            client.send(m.Heartbeat(rank=self._rank, step=self.step))
            if not self._last_words.empty():
                client.send(self._last_words.get())
                client.close()  # lingers until it is delivered
                self._heard.set()
                return
            message = client.receive(HEARTBEAT_SECONDS)
            if isinstance(message, m.Abort):
                if message.host == supervision.host_id():
                    supervision.kill([pid for pid in message.culprits if pid != os.getpid()])
                os._exit(1)
            if message is not None:
                last_word = time.monotonic()
                self._ending.wait(HEARTBEAT_SECONDS)
            elif time.monotonic() - last_word > self.timeout:
                self._on_silence(f"the driver has not answered for {self.timeout:.0f} s")
                os._exit(1)
        client.close()

    def stop(self) -> None:
        self._ending.set()
