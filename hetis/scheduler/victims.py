"""Which running sequences give way to an earlier one that lacks pages. Questions only: the scheduler preempts."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable

from hetis.cache.cache_manager import CacheManager
from hetis.core.placement import Dispatcher, PoolId
from hetis.core.request import Sequence, arrival_of


class Victims:
    """The latest arrivals first, and no more of them than needed."""

    def __init__(self, cache: CacheManager, dispatcher: Dispatcher, running: list[Sequence]) -> None:
        """`running`: the scheduler's own list, in order of arrival."""
        self._cache, self._dispatcher, self._running = cache, dispatcher, running

    def for_pages(self, sequence: Sequence, pools: Collection[PoolId]) -> Sequence | None:
        """The sequence to preempt: the latest arrival after `sequence` that holds pages of `pools`.

        If there is none, `sequence` itself, provided that it can be placed elsewhere, if need be with the pages of all
        later ones. None: it waits until earlier ones finish, which never wait for it.
        """
        later = self._later_than(sequence)
        holders = [s for s in later if self._cache.is_in(s.slot, pools)]
        if holders:
            return holders[0]
        return sequence if self._can_be_placed(sequence, [sequence, *later]) else None

    def for_admission(self, sequence: Sequence) -> list[Sequence] | None:
        """The fewest later sequences that make room for a preempted one, latest first; None if all are too few."""
        later = self._later_than(sequence)
        if not self._can_be_placed(sequence, later):
            return None
        count = bisect_left(range(len(later)), True, key=lambda n: self._can_be_placed(sequence, later[:n]))
        return later[:count]

    def are_coming_free(self, pools: Collection[PoolId]) -> bool:
        """Whether steps in flight give back pages of `pools` without a victim, as they end sequences or prompts."""
        flying = [sequence for sequence in self._running if sequence.in_flight]
        return any(s.is_complete and self._cache.is_in(s.slot, pools) for s in flying) or any(
            s.num_scheduled >= s.prompt_len and self._cache.is_staged_in(s.slot, pools) for s in flying
        )

    def _later_than(self, sequence: Sequence) -> list[Sequence]:
        """Running sequences that arrived after `sequence`, latest first."""
        return self._running[bisect_right(self._running, sequence.arrival, key=arrival_of) :][::-1]

    def _can_be_placed(self, sequence: Sequence, without: Iterable[Sequence]) -> bool:
        """Whether `sequence` could be admitted if the sequences in `without` were not running."""
        view = self._cache.view(without={s.slot for s in without})
        return self._dispatcher.assign([sequence], view)[0] is not None
