"""A rank's heartbeats to the driver, its reports of failures, and its end without its agent."""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from hetis.comm.control import ControlClient
from hetis.core import messages as m
from hetis.processes.waker import Waker

INTERVAL_SECONDS = 0.25  # between two heartbeats


class Heartbeat(threading.Thread):
    """Sends heartbeats on a socket of its own, so that a long step does not look like a dead rank.

    A rank that fails reports it, and waits: its agent ends it, whatever it does, when the driver has found the cause.
    Where the kernel does not end a process with its parent, this thread ends it when the agent's end of the channel is
    closed.
    """

    def __init__(self, endpoint: str, rank: int, agent: socket.socket) -> None:
        """`agent`: the channel to it, on which nothing more is received."""
        super().__init__(name="heartbeat", daemon=True)
        self._endpoint, self._rank, self._agent = endpoint, rank, agent
        self.last_step: Callable[[], int] = lambda: -1  # that the rank has finished
        self._waker = Waker()
        self._stopping = threading.Event()
        self._failures: queue.SimpleQueue[m.Failure] = queue.SimpleQueue()

    def report(self, reported: m.Failure) -> None:
        """Sends a failure of this rank to the driver, from any thread."""
        self._failures.put(reported)
        self._waker.wake()

    def stop(self) -> None:
        """Ends the thread: this rank has done its work."""
        self._stopping.set()
        self._waker.wake()
        self.join()

    def run(self) -> None:
        client = ControlClient(self._endpoint, str(self._rank), "health")
        wait = client.waiter(self._waker.fileno(), self._agent.fileno(), until_lost=False)
        next_beat = time.monotonic()
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= next_beat:
                client.send(m.Heartbeat(rank=self._rank, step=self.last_step()))
                next_beat = now + INTERVAL_SECONDS
            wait(max(0.0, next_beat - now))
            self._waker.drain()
            with suppress(queue.Empty):
                client.send(self._failures.get_nowait())
            with suppress(BlockingIOError):
                if not self._agent.recv(1, socket.MSG_DONTWAIT):
                    os._exit(1)
        client.close(linger=0)
