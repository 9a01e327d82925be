"""An agent's connection to the driver: what it says, what it is told, and whether the driver lives."""

import select
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hetis.core import messages as m

if TYPE_CHECKING:
    from hetis.comm.control import ControlClient

PING_SECONDS = 0.5  # between two questions whether the driver lives


class DriverLink:
    """Keeps messages until the driver listens."""

    def __init__(self, step_timeout: float) -> None:
        """`step_timeout`: seconds without an answer after which the driver counts as dead."""
        self._timeout = step_timeout
        self._control: ControlClient | None = None
        self._unsent: list[m.Message] = []
        self._next_ping = 0.0
        self._unanswered: float | None = None  # time of the first question since the last answer
        self.is_heard = False

    def connect(self, endpoint: str, ranks: Sequence[int]) -> None:
        """The driver listens. `ranks`: of this agent."""
        from hetis.comm.control import ControlClient  # zmq: here, while the children start

        self._control = ControlClient(endpoint, f"agent-{ranks[0] if ranks else ''}", "agents")
        for message in (m.AgentHello(ranks=list(ranks)), *self._unsent):
            self._control.send(message)

    @property
    def is_connected(self) -> bool:
        return self._control is not None

    def send(self, message: m.Message) -> None:
        if self._control is None:
            self._unsent.append(message)
        else:
            self._control.send(message)

    def wait(self, descriptors: Iterable[int], seconds: float) -> None:
        """Waits until a message has come or a descriptor is readable; not longer than it takes to ask the driver."""
        if self._control is None:
            select.select([*descriptors], [], [], None if seconds == float("inf") else seconds)
        else:
            self._control.waiter(*descriptors, until_lost=False)(min(seconds + 0.001, PING_SECONDS))

    def ends(self) -> Iterator[m.End]:
        """What the driver has said since the last call."""
        while self._control is not None and (message := self._control.receive(0)) is not None:
            self.is_heard, self._unanswered = True, None
            if isinstance(message, m.End):
                yield message

    def problem(self, is_child: bool) -> str | None:
        """What is wrong with the driver, as the rest of a sentence; asks it when that is due. Read `ends` before.

        `is_child`: of this process, which gets its wait status.
        """
        if self._control is None:
            return None
        if self._control.is_lost and not is_child:
            return "ended"
        now = time.monotonic()
        if self._unanswered is not None and now - self._unanswered > self._timeout:
            return f"has not answered for {self._timeout:g} s (stopped, or its host is gone)"
        if now >= self._next_ping:
            self._control.send(m.Ping())
            self._next_ping = now + PING_SECONDS
            self._unanswered = now if self._unanswered is None else self._unanswered
        return None
