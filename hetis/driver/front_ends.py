"""Front ends as the driver tells them apart: who is attached and lives, the ids of their sequences, their questions."""

import os
from collections.abc import Iterable, Iterator

from hetis.comm.control import ControlServer
from hetis.core import messages as m
from hetis.core.device_info import RankStats
from hetis.processes import supervision


class FrontEnds:
    """Front ends by the identity of their sockets: messages to and from them, and which of them are attached.

    Sending never waits: for a front end that does not read, messages are kept.
    """

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._attached: dict[bytes, int] = {}  # front end -> pid
        self._fds: dict[int, bytes] = {}  # descriptor that is readable when the process has ended -> front end
        self._gone: list[bytes] = []  # that were attached

    @property
    def attached(self) -> list[bytes]:
        return list(self._attached)

    def is_attached(self, front: bytes) -> bool:
        return front in self._attached

    def receive(self) -> Iterator[tuple[bytes, m.Message]]:
        """(front end, message), as long as there are any. `Attach` and `Detach` have taken effect."""
        while (received := self._server.receive("front")) is not None:
            front, message = received
            match message:
                case m.Attach() if not self._attach(front, message.pid):
                    self.answer(front, m.Refused(reason=f"no process {message.pid} runs on this host."))
                    continue
                case m.Detach():
                    self._detach(front)
            yield front, message

    def answer(self, front: bytes, message: m.Message) -> None:
        self._server.send("front", front, message)

    def tell(self, message: m.Message) -> None:
        """Sends to all front ends that are attached."""
        for front in self._attached:
            self.answer(front, message)

    def _attach(self, front: bytes, pid: int) -> bool:
        """False if there is no such process. A front end that attaches again stays what it is."""
        if front in self._attached:
            return True
        if not 0 < pid < 1 << 31 or supervision.has_ended(pid):
            return False
        self._attached[front] = pid
        fd = supervision.open_pidfd(pid)
        if fd is not None:
            self._fds[fd] = front
            self._server.poller.register(fd)
        return True

    def _detach(self, front: bytes) -> None:
        if self._attached.pop(front, None) is None:
            return
        self._gone.append(front)
        for fd in [fd for fd, each in self._fds.items() if each == front]:
            self._server.poller.unregister(fd)
            del self._fds[fd]
            os.close(fd)

    def notice_ends(self, events: Iterable[object]) -> None:
        """Detaches front ends that have ended. `events`: what the poller has returned."""
        fronts = [self._fds[fd] for fd in events if isinstance(fd, int) and fd in self._fds]
        watched = set(self._fds.values())
        fronts += [f for f, pid in self._attached.items() if f not in watched and supervision.has_ended(pid)]
        for front in fronts:
            self._detach(front)

    def take_gone(self) -> list[bytes]:
        """Front ends that have detached, or ended, since the last call."""
        gone, self._gone = self._gone, []
        return gone


class SequenceIds:
    """Ids of sequences at the engine: the number of the front end, then the id that it chose.

    Front ends number their requests independently, so two of them use equal ids.
    """

    def __init__(self) -> None:
        self._fronts: dict[int, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        self._unfinished: dict[bytes, dict[str, None]] = {}  # ids at the engine by front end, in order of arrival
        self._num_fronts = 0

    def add(self, front: bytes, own_id: str) -> str | None:
        """The id of a new sequence; None if the front end has an unfinished one of this id."""
        if front not in self._numbers:
            self._numbers[front], self._fronts[self._num_fronts] = self._num_fronts, front
            self._unfinished[front] = {}
            self._num_fronts += 1
        name = f"{self._numbers[front]}:{own_id}"
        if name in self._unfinished[front]:
            return None
        self._unfinished[front][name] = None
        return name

    def find(self, front: bytes, own_id: str) -> str | None:
        """The id of an unfinished sequence; None if there is none."""
        name = f"{self._numbers.get(front)}:{own_id}"
        return name if name in self._unfinished.get(front, ()) else None

    def forget(self, front: bytes) -> list[str]:
        """Drops what still comes for a front end that has gone; returns its unfinished sequences."""
        number = self._numbers.pop(front, None)
        if number is None:
            return []
        del self._fronts[number]
        return list(self._unfinished.pop(front))

    def by_front(self, outputs: Iterable[m.TokenOutput]) -> dict[bytes, list[m.TokenOutput]]:
        """The outputs of each front end, in order, with its own ids."""
        found: dict[bytes, list[m.TokenOutput]] = {}
        for output in outputs:
            number, _, own_id = output.id.partition(":")
            front = self._fronts.get(int(number))
            if front is None:  # it has gone
                continue
            if output.finish_reason is not None:
                self._unfinished[front].pop(output.id, None)
            output.id = own_id
            found.setdefault(front, []).append(output)
        return found


def own_id(engine_id: str) -> str:
    """The id that the front end chose for a sequence; "" for ""."""
    return engine_id.partition(":")[2]


class StatsCollector:
    """Gathers the counters of all ranks for the front ends that ask meanwhile."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._stats: dict[int, RankStats] = {}
        self._asking: set[bytes] = set()  # front ends
        self.num_missing = 0  # answers of ranks

    def ask(self, front: bytes) -> bool:
        """Notes a question; True if the ranks must be asked, since no question is open."""
        is_first = not self._asking
        self._asking.add(front)
        return is_first

    def forget(self, front: bytes) -> None:
        self._asking.discard(front)

    def begin(self) -> None:
        """Notes that all ranks have been asked."""
        self.num_missing += self._num_ranks

    def on_stats(self, stats: RankStats) -> dict[int, RankStats] | None:
        """The counters of all ranks once the last answer has come, else None."""
        self._stats[stats.rank] = stats
        self.num_missing -= 1
        return None if self.num_missing else self._stats

    def take_asking(self) -> set[bytes]:
        """The front ends that have asked since the last call."""
        asking, self._asking = self._asking, set()
        return asking
