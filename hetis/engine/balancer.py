"""Starts migrations: at intervals towards balance, and from page pools that run out.

`dispatcher.rebalance` decides what moves; `cache.migration` carries it out.
"""

from collections.abc import Collection, Iterable, Mapping

from hetis.cache.cache_manager import CacheManager
from hetis.cache.migration import Migrator
from hetis.core.placement import PoolId
from hetis.core.request import Sequence
from hetis.dispatcher.rebalance import MigrationBudget, Rebalancer
from hetis.dispatcher.residents import Resident
from hetis.dispatcher.room import shortage_of
from hetis.engine.events import EventLog

INTERVAL_SECONDS = 0.25  # between two checks of the balance
BURST_SECONDS = 1.0  # worth of the migration budget that may move at once


class Balancer:
    """The `Relief` of a fleet whose lanes can move."""

    def __init__(
        self,
        cache: CacheManager,
        migrator: Migrator,
        rebalancer: Rebalancer,
        bytes_per_second: float,
        events: EventLog,
    ) -> None:
        """`bytes_per_second`: limit of what moves towards balance; pages that run out are relieved without limit."""
        self._cache, self._migrator, self._rebalancer, self._events = cache, migrator, rebalancer, events
        self._budget = MigrationBudget(bytes_per_second, BURST_SECONDS * bytes_per_second)
        self._last_check: float | None = None  # None: `balance` has not been called
        self.num_rebalances = 0  # times that migrations started towards balance
        self.num_reliefs = 0  # times that migrations started because pages ran out

    @property
    def is_busy(self) -> bool:
        return self._migrator.is_busy

    def balance(self, running: Collection[Sequence], refused: Sequence | None, now: float) -> None:
        """Once per interval, moves lanes off the slowest devices, and off homes that lack pages for `refused`.

        `refused`: the first of the queue, if it found no place. `now`: seconds, never less than in the call before; the
        first interval begins with the first call.
        """
        if self._last_check is None:
            self._last_check = now
        elapsed = now - self._last_check
        if elapsed < INTERVAL_SECONDS:
            return
        self._last_check = now
        self._budget.refill(elapsed)
        self._rebalance(running, len(refused.token_ids) if refused else _mean_prompt(running))
        if refused is not None:
            shortage = shortage_of(refused, self._cache.view())
            if shortage is not None:
                self._relieve(shortage.missing, running)

    def _rebalance(self, running: Collection[Sequence], staging_tokens: int) -> None:
        """`staging_tokens`: of the prompt for which homes should keep room."""
        outcome = self._rebalancer.compute(self.residents(running), self._cache.view(), self._budget, staging_tokens)
        assert not outcome.preempt, "no rank has left the plan"
        started = self._migrator.start(outcome.moves)
        self.num_rebalances += bool(started)
        self._events.on_moves("rebalance", started)

    def make_room(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        """See `core.placement.Relief`. Migrations into these pools are cancelled, if that frees enough pages."""
        if all(self._cache.num_arriving(pool) >= count for pool, count in missing.items()):
            self._migrator.cancel_into(missing)
            return {}
        return self._relieve(missing, running)

    def _relieve(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        """Starts migrations as far as those in progress do not free enough pages; returns what cannot be found."""
        lacking = {pool: count - self._cache.num_leaving(pool) for pool, count in missing.items()}
        lacking = {pool: count for pool, count in lacking.items() if count > 0}
        if not lacking:
            return {}
        relief = self._rebalancer.memory(self.residents(running), self._cache.view(), lacking)
        started = self._migrator.start(relief.moves)
        self.num_reliefs += bool(started)
        self._events.on_moves("relief", started)
        return {pool: lacking[pool] for pool in relief.exhausted}

    def residents(self, running: Iterable[Sequence]) -> list[Resident]:
        """Running sequences as the rebalancer sees them; those in prefill or with migrating lanes are not movable."""
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
    """Mean tokens of the running sequences' prompts: the guess for the prompt that comes next."""
    return sum(sequence.prompt_len for sequence in running) // max(1, len(running))
