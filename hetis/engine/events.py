"""The latest decisions of the engine, for front ends that show a fleet: placements, migrations, preemptions."""

from collections import Counter, deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from hetis.core.messages import FleetEvent
from hetis.core.placement import Move, Placement
from hetis.core.sizes import plural

MAX_EVENTS = 256  # that are kept


class _Dispatch(NamedTuple):
    sequence_id: str
    placement: Placement

    @property
    def text(self) -> str:
        counts = Counter(chain.from_iterable(self.placement.owners))
        return "head groups placed: " + ", ".join(f"{count} on rank {rank}" for rank, count in sorted(counts.items()))


class _Moves(NamedTuple):
    moves: Sequence[Move]
    sequence_id: str = ""

    @property
    def text(self) -> str:
        counts = Counter((move.source, move.target) for move in self.moves)
        routes = (f"{count} from rank {source} to {target}" for (source, target), count in sorted(counts.items()))
        return f"{plural(len(self.moves), 'head group')}: {', '.join(routes)}"


class _Preemption(NamedTuple):
    sequence_id: str
    num_tokens: int

    @property
    def text(self) -> str:
        return f"{plural(self.num_tokens, 'token')} to recompute, since earlier sequences need its pages"


class EventLog:
    """A bounded ring of events with running numbers.

    The text of an event is made when it is asked for: the step in which it happens pays for a tuple.
    """

    def __init__(self) -> None:
        self.now = 0.0  # seconds on the driver's clock; set by the engine before it decides
        self._events: deque[tuple[int, float, str, _Dispatch | _Moves | _Preemption]] = deque(maxlen=MAX_EVENTS)
        self._number = 0

    def on_dispatch(self, sequence_id: str, placement: Placement) -> None:
        self._add("dispatch", _Dispatch(sequence_id, placement))

    def on_moves(self, kind: str, moves: Sequence[Move]) -> None:
        """`kind`: "rebalance" or "relief" for lanes that begin to migrate, "migration" for lanes that have moved."""
        if moves:
            self._add(kind, _Moves(moves))

    def on_preemption(self, sequence_id: str, num_tokens: int) -> None:
        self._add("preemption", _Preemption(sequence_id, num_tokens))

    def _add(self, kind: str, what: _Dispatch | _Moves | _Preemption) -> None:
        self._number += 1
        self._events.append((self._number, self.now, kind, what))

    def after(self, number: int) -> list[FleetEvent]:
        """The events after that number, as far as they are kept, oldest first."""
        return [
            FleetEvent(number=each, clock=clock, kind=kind, sequence_id=what.sequence_id, text=what.text)
            for each, clock, kind, what in self._events
            if each > number
        ]
