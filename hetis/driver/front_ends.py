"""Front ends as the driver tells them apart: the ids of their sequences, and their questions for statistics."""

from collections.abc import Iterable

from hetis.core.device_info import RankStats
from hetis.core.messages import TokenOutput


class SequenceIds:
    """Ids of sequences at the engine: the number of the front end, then the id that it chose.

    Front ends number their requests independently, so two of them use equal ids.
    """

    def __init__(self) -> None:
        self._fronts: list[bytes] = []
        self._numbers: dict[bytes, int] = {}

    def to_engine(self, front: bytes, own_id: str) -> str:
        if front not in self._numbers:
            self._numbers[front] = len(self._fronts)
            self._fronts.append(front)
        return f"{self._numbers[front]}:{own_id}"

    def by_front(self, outputs: Iterable[TokenOutput]) -> dict[bytes, list[TokenOutput]]:
        """The outputs of each front end, in order, with its own ids."""
        found: dict[bytes, list[TokenOutput]] = {}
        for output in outputs:
            number, _, output.id = output.id.partition(":")
            found.setdefault(self._fronts[int(number)], []).append(output)
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
