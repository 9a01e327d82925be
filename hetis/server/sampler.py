"""The latest snapshot of the fleet, which metrics and the feed share."""

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from hetis.core.messages import FleetSnapshot, FleetSnapshotQuery
from hetis.frontend.errors import EngineDeadError

if TYPE_CHECKING:
    from hetis.frontend.async_llm import AsyncLLM

MAX_SEQUENCES = 64
MAX_EVENTS = 50  # that are kept
ANSWER_SECONDS = 0.5  # that a driver may take to answer before the last snapshot is used once more


class SeenEvent(NamedTuple):
    """A decision of the engine as shown to people."""

    number: int
    time: float  # Unix time, seconds
    kind: str
    text: str


class FleetSampler:
    """Asks the driver when a snapshot is wanted, one question at a time; a silent driver delays nothing for long."""

    def __init__(self, llm: "AsyncLLM") -> None:
        self._llm = llm
        self.latest: FleetSnapshot | None = None  # None: the driver has not answered yet
        self.events: deque[SeenEvent] = deque(maxlen=MAX_EVENTS)
        self._taken = 0.0  # when `latest` came, on the clock of this process
        self._task: asyncio.Task[None] | None = None  # waits for an answer

    @property
    def age(self) -> float:
        """Seconds since `latest` came."""
        return time.monotonic() - self._taken

    def events_after(self, number: int) -> list[SeenEvent]:
        return [event for event in self.events if event.number > number]

    async def refresh(self, max_age: float, seconds: float = ANSWER_SECONDS) -> None:
        """Makes `latest` at most `max_age` seconds old, unless the driver does not answer within `seconds`.

        Then the question stays open: the answer is taken when it comes, and there is no second question meanwhile.
        """
        if self._task is None and (self.latest is None or self.age > max_age):
            self._task = asyncio.create_task(self._ask())
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)

    async def _ask(self) -> None:
        number = self.events[-1].number if self.events else 0
        try:
            query = FleetSnapshotQuery(max_sequences=MAX_SEQUENCES, after_event=number)
            self._take(await self._llm.ask(query, FleetSnapshot))
        except EngineDeadError:  # the last snapshot stays
            pass
        finally:
            self._task = None

    def _take(self, snapshot: FleetSnapshot) -> None:
        self.latest, self._taken = snapshot, time.monotonic()
        now = time.time()
        for event in snapshot.events:
            name = shown_id(event.sequence_id)
            text = f"{name}: {event.text}" if name else event.text
            self.events.append(SeenEvent(event.number, now - (snapshot.clock - event.clock), event.kind, text))


def shown_id(sequence_id: str) -> str:
    """The id that a client knows its request by, and the number of the completion after the first one.

    The front end's ids are "cmpl-1#7/0": the request's id, its number at the front end, the completion's number.
    """
    key, _, index = sequence_id.rpartition("/")
    name = key.rpartition("#")[0] or key
    return name if index == "0" or not index else f"{name}/{index}"
