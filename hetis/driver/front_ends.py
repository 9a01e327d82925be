"""Front ends as the driver tells them apart: whose sequences these are, and which of them ask for statistics."""

from hetis.core.device_info import RankStats


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
