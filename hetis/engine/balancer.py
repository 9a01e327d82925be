"""Moves lanes of running sequences: towards balance now and then, and off pools that run out of pages.

What should move is decided by `dispatcher.rebalance`; `cache.migration` carries it out.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

from hetis.cache.cache_manager import CacheManager
from hetis.cache.migration import Migrator
from hetis.core.placement import PoolId
from hetis.core.request import Sequence
from hetis.dispatcher.rebalance import MigrationBudget, Rebalancer
from hetis.dispatcher.residents import Resident
from hetis.dispatcher.room import shortage_of

INTERVAL_SECONDS = 0.25  # between two looks at the balance
BURST_SECONDS = 1.0  # of the migration budget, that may move at once


class Balancer:
    """The `Relief` of a fleet whose lanes can move."""

    def __init__(
        self,
        cache: CacheManager,
        migrator: Migrator,
        rebalancer: Rebalancer,
        bytes_per_second: float,
        clock: Callable[[], float],
    ) -> None:
        """`bytes_per_second`: that may move for the sake of balance. `clock`: seconds."""
        self._cache, self._migrator, self._rebalancer, self._clock = cache, migrator, rebalancer, clock
        self._budget = MigrationBudget(bytes_per_second, BURST_SECONDS * bytes_per_second)
        self._last = clock()
        self.num_rebalances = 0  # times that lanes moved for balance
        self.num_reliefs = 0  # times that lanes moved for pages

    @property
    def is_busy(self) -> bool:
        return self._migrator.is_busy

    def balance(self, running: Collection[Sequence], refused: Sequence | None) -> None:
        """Now and then: has lanes move off the slowest devices, and off homes that lack pages for `refused`.

        `refused`: the first of the queue, if it found no place.
        """
        now = self._clock()
        if now - self._last < INTERVAL_SECONDS:
            return
        self._budget.refill(now - self._last)
        self._last = now
        staging_tokens = len(refused.token_ids) if refused else _mean_prompt(running)
        residents, view = self.residents(running), self._cache.view()
        outcome = self._rebalancer.compute(residents, view, self._budget, staging_tokens)
        assert not outcome.preempt, "no rank has left the plan"
        self.num_rebalances += bool(self._migrator.start(outcome.moves))
        if refused is not None:
            shortage = shortage_of(refused, self._cache.view())
            if shortage is not None:
                self._relieve(shortage.missing, running)

    def make_room(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        """See `core.placement.Relief`. Lanes that are on their way there stay where they are, if that is enough."""
        if all(self._cache.num_arriving(pool) >= count for pool, count in missing.items()):
            self._migrator.cancel_into(missing)
            return {}
        return self._relieve(missing, running)

    def _relieve(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        """Has lanes leave, as far as those that leave already are not enough. What cannot be found."""
        lacking = {pool: count - self._cache.num_leaving(pool) for pool, count in missing.items()}
        lacking = {pool: count for pool, count in lacking.items() if count > 0}
        if not lacking:
            return {}
        relief = self._rebalancer.memory(self.residents(running), self._cache.view(), lacking)
        self.num_reliefs += bool(self._migrator.start(relief.moves))
        return {pool: lacking[pool] for pool in relief.exhausted}

    def residents(self, running: Iterable[Sequence]) -> list[Resident]:
        """What the rebalancer may know of each. Lanes stay until all their tokens are computed, or have arrived."""
        cache = self._cache
        return [
            Resident(
                slot=sequence.slot,
                arrival=sequence.arrival,
                num_tokens=cache.num_tokens(sequence.slot),
                owners=cache.owners(sequence.slot),
                movable=sequence.is_generating and not cache.is_moving(sequence.slot),
            )
            for sequence in running
        ]


def _mean_prompt(running: Collection[Sequence]) -> int:
    """Tokens of the prompt that may come next, if it is like those that run."""
    return sum(sequence.prompt_len for sequence in running) // max(1, len(running))
