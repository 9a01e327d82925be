"""A rank's heartbeats to the driver, and the early end of its process."""

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from hetis.comm.control import ControlClient
from hetis.core import messages as m
from hetis.processes import failure, supervision
from hetis.processes.waker import Waker

INTERVAL_SECONDS = 0.25  # between two heartbeats
REASON_SECONDS = 5.0  # that a rank which must end waits for the driver's failure reason


class Heartbeat(threading.Thread):
    """Sends heartbeats on a socket of its own, so that a long step does not look like a dead rank; ends the process.

    Whatever ends a rank early goes through this thread: `Abort` from the driver, a driver that has ended or has been
    silent for `timeout` seconds, a failure of the rank (`report`), a signal of its launcher. In the last two cases it
    waits for the driver's failure reason, so that the cause is the last line. A stopped process (SIGSTOP) cannot end
    itself; other ranks of its host kill it.
    """

    def __init__(
        self,
        endpoint: str,
        rank: int,
        waker: Waker,
        on_lost_driver: Callable[[str], None],
        prints_reason: bool = False,
    ) -> None:
        """`waker`: woken by the signals that ask this rank to end. `on_lost_driver`: called with how the driver was
        lost, before the process ends. `prints_reason`: no other process of this host prints it.
        """
        super().__init__(name="heartbeat", daemon=True)
        self._endpoint, self._rank, self._waker = endpoint, rank, waker
        self._on_lost_driver, self._prints_reason = on_lost_driver, prints_reason
        self.timeout = 120.0  # until Setup sets it
        self.host = supervision.host_id()  # until ranks have proven theirs
        self.last_step: Callable[[], int] = lambda: -1  # that the rank has finished
        self._stopping = threading.Event()
        self._failures: queue.SimpleQueue[m.Failure] = queue.SimpleQueue()
        self._deadline: float | None = None  # for the driver's reason, once this rank must end
        self._last_answer = 0.0

    def report(self, reported: m.Failure) -> None:
        """Sends a failure of this rank to the driver, from any thread. The process ends soon after."""
        self._failures.put(reported)
        self._waker.wake()

    def stop(self) -> None:
        """Ends the thread, not the process: this rank has done its work."""
        self._stopping.set()
        self._waker.wake()
        self.join()

    def run(self) -> None:
        client = ControlClient(self._endpoint, str(self._rank), "rank")
        wait = client.waiter(self._waker.fileno(), until_lost=False)
        self._last_answer = next_beat = time.monotonic()
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= next_beat:
                client.send(m.Heartbeat(rank=self._rank, step=self.last_step()))
                next_beat = now + INTERVAL_SECONDS
            wait(max(0.0, next_beat - now))
            self._read(client)
            self._send_reports(client)
            self._check(client)
        client.close(linger=0)

    def _read(self, client: ControlClient) -> None:
        while (message := client.receive(0)) is not None:
            self._last_answer = time.monotonic()
            if isinstance(message, m.Abort):
                if message.host == self.host:
                    supervision.kill(pid for pid in message.pids_to_kill if pid != os.getpid())
                self._end(message.reason)

    def _send_reports(self, client: ControlClient) -> None:
        """Tells the driver of a failure of this rank, or that its launcher asks it to end."""
        if any(self._waker.drain()):
            client.send(m.Failure(rank=self._rank, reason=failure.END_REQUESTED, is_consequence=True))
            self._deadline = self._deadline or time.monotonic() + REASON_SECONDS
        with suppress(queue.Empty):
            client.send(self._failures.get_nowait())
            self._deadline = self._deadline or time.monotonic() + REASON_SECONDS

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
        failure.report_to_torchrun(reason)
        if self._prints_reason:
            failure.show(reason)
        os._exit(1)
