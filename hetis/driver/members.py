"""All processes of a job as the driver sees them: their messages, their signs of life, and their end."""

import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from io import RawIOBase

from hetis.comm.control import ControlServer, encode
from hetis.core import messages as m
from hetis.core.config import DriverArgs
from hetis.core.device_info import DeviceInfo
from hetis.driver import final_status
from hetis.driver.front_ends import FrontEnds
from hetis.driver.watch import FleetFailedError, Watch
from hetis.processes import supervision
from hetis.processes.failure import FailureRecord

POLL_MILLISECONDS = 200
END_SECONDS = 1.5  # that ranks have to end in order
FAIL_SECONDS = 3.0  # that they have to end when the job fails


class JobEndedError(Exception):
    """Not a failure: the owner of the fleet or rank 0 wants the job to end in order."""


class Members:
    """Ranks, front ends and rank 0 as the driver's parent, over one poller.

    The driver outlives the ranks of its host, and kills those that do not end by themselves.
    """

    def __init__(self, args: DriverArgs, server: ControlServer, parent: RawIOBase) -> None:
        """`parent`: where rank 0 writes; unbuffered, since a poller does not see what has been read ahead."""
        self._args, self._server, self._parent = args, server, parent
        self.ranks = args.plan.ranks
        self.watch = Watch(args.plan, args.config.step_timeout)
        self.front_ends = FrontEnds(server)
        self._joined: list[int] = []
        self._is_ending = False
        server.poller.register(parent.fileno())

    def wait(self, milliseconds: int = POLL_MILLISECONDS) -> None:
        """Waits for messages; notes heartbeats and ends of processes."""
        events = set(dict(self._server.poller.poll(milliseconds)))
        self._read_health()
        self.front_ends.notice_ends(events)
        for fd in events & set(self.watch.pid_fds):
            self._server.poller.unregister(fd)
            self.watch.on_death(fd)
        if self._parent.fileno() in events:
            self._read_parent()

    def check(self) -> None:
        """Raises FleetFailedError when the fleet cannot go on, and JobEndedError when the job is to end in order."""
        self.watch.check()
        if self._is_ending:
            raise JobEndedError

    def _read_health(self) -> None:
        while (received := self._server.receive("health")) is not None:
            identity, message = received
            if isinstance(message, m.Heartbeat):
                self.watch.on_heartbeat(message.rank, message.step)
                self._server.send("health", identity, m.Pong())
            elif isinstance(message, m.Failure):
                self.watch.on_failure(message)

    def _read_parent(self) -> None:
        self._server.poller.unregister(self._parent.fileno())
        match self._parent.readline():
            case final_status.SHUT_DOWN:
                self._is_ending = True
            case final_status.ASKED_TO_END:
                self.watch.on_parent_death(signal.SIGTERM)
            case _:
                self.watch.on_parent_death(supervision.await_status(self._args.parent, 1.0))

    # --- ranks --------------------------------------------------------------------------------------------------------

    def from_ranks(self) -> Iterator[m.Message]:
        """Messages of ranks, as long as there are any."""
        while (received := self._server.receive("ranks")) is not None:
            _, message = received
            if isinstance(message, m.Hello):
                self._on_hello(message.info)
            yield message

    def _on_hello(self, info: DeviceInfo) -> None:
        self._joined.append(info.rank)
        fd = self.watch.on_hello(info)
        if fd is not None:
            self._server.poller.register(fd)

    def send(self, rank: int, message: m.Message) -> None:
        self._server.send("ranks", str(rank).encode(), message)

    def broadcast(self, message: m.Message) -> None:
        """Sends to all ranks that have joined."""
        payload = encode(message)
        for rank in self._joined:
            self._server.send("ranks", str(rank).encode(), payload)

    # --- front ends ---------------------------------------------------------------------------------------------------

    def from_front_ends(self) -> Iterator[tuple[bytes, m.Message]]:
        """(front end, message), as long as there are any, without the owner's `Shutdown`, which ends the job."""
        for front, message in self.front_ends.receive():
            if isinstance(message, m.Shutdown):
                self._is_ending = True
            else:
                yield front, message

    def hide_sockets(self) -> None:
        """No other process can connect from now on."""
        self._server.hide()

    # --- the end ------------------------------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """Ends the job in order. Rank 0 ends last: it waits for the driver."""
        self.broadcast(m.Shutdown())
        self._outlive([rank for rank in self.ranks if rank != 0], END_SECONDS)

    def fail(self, error: FleetFailedError) -> None:
        """Records the failure reason, gives it to front ends and ranks, and returns when all ranks have ended.

        Stopped processes are killed, by the driver on this host and by ranks on others.
        """
        text = error.reason.text
        FailureRecord(self._args.run_directory, prints=self._args.announce).write(error.reason)
        self.front_ends.tell(m.EngineDead(reason=text))
        supervision.kill(error.pids_to_kill.get(supervision.host_id(), []))
        self._abort(text, error.pids_to_kill, self.ranks)
        self._outlive(self.ranks, FAIL_SECONDS)
        if self._args.announce:  # else the front end reads the record
            shutil.rmtree(self._args.run_directory, ignore_errors=True)

    def _abort(self, reason: str, pids_to_kill: Mapping[str, list[int]], ranks: Iterable[int]) -> None:
        for host, pids in (pids_to_kill or {"": []}).items():
            abort = encode(m.Abort(reason=reason, host=host, pids_to_kill=pids))
            for rank in ranks:
                self._server.send("health", str(rank).encode(), abort)

    def _outlive(self, ranks: Iterable[int], seconds: float) -> None:
        """Waits for the end of these ranks, then ends those that still live."""
        deadline = time.monotonic() + seconds
        while (living := set(ranks) & set(self.watch.living())) and time.monotonic() < deadline:
            self.wait(50)
        self._abort("the job ended before this rank had.", {}, living)
        supervision.kill(pid for rank in living if (pid := self.watch.pid_here(rank)) is not None)
