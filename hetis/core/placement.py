"""Where lanes live: placements, moves, pools of pages, and the interfaces of the policies that decide."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from hetis.core.plan import Plan
from hetis.core.request import Sequence


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where the lanes of a sequence live: `owners[stage][group]` is the group's home or any attention worker."""

    owners: tuple[tuple[int, ...], ...]


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """The decision that a lane migrates from rank `source` to rank `target`."""

    slot: int
    stage: int
    group: int
    source: int
    target: int


class PoolId(msgspec.Struct, frozen=True, order=True):
    """One pool: the pages of `rank` for the layers of `stage`. A home has one, a worker one per stage."""

    rank: int
    stage: int


def pools_of(plan: Plan) -> list[PoolId]:
    """Pools of all homes, stage by stage, then those of each worker."""
    homes = [PoolId(home.rank, stage) for stage, home in plan.homes]
    return homes + [PoolId(rank, stage) for rank in plan.worker_ranks for stage in range(len(plan.stages))]


class Shortage(msgspec.Struct, frozen=True):
    """Pages that are missing, by pool."""

    missing: Mapping[PoolId, int]

    def __str__(self) -> str:
        pools = sorted(self.missing.items())
        return ", ".join(
            f"rank {pool.rank} lacks {count} {'page' if count == 1 else 'pages'} for stage {pool.stage}"
            for pool, count in pools
        )


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the cache that dispatchers see."""

    plan: Plan
    page_size: int
    free_pages: Mapping[PoolId, int]  # less a page to grow for each lane there; may be < 0
    held_lanes: Mapping[PoolId, int]  # that live there, or will after their migration; staging does not count
    held_tokens: Mapping[PoolId, int]  # of these lanes


class Dispatcher(Protocol):
    """Decides where the lanes of new sequences live. A function of data: one view always gives one result."""

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        """A placement for each new sequence, in order of arrival; None for those that do not fit now.

        All placements together fit into `view.free_pages`: for each lane the pages of `token_ids` and some to grow at
        its owner, and the pages of `token_ids` for staging at its home, if that is another rank.
        """
        ...

    def why_not(self, sequence: Sequence, view: FleetView) -> str:
        """Why a sequence got no placement, in words for the log."""
        ...


class Relief(Protocol):
    """Frees pages of pools that run out of them by migration, so that fewer sequences are preempted."""

    @property
    def is_busy(self) -> bool:
        """Whether lanes are migrating, so that steps without rows have pages to transfer."""
        ...

    def make_room(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        """Starts migrations that free these pages. Returns those it cannot free: a sequence must be preempted, or wait.

        The others are free when it returns, or will be when migrations are committed; then `is_busy` is true.
        """
        ...


class NoRelief:
    """The relief of fleets whose lanes never migrate: none."""

    is_busy = False

    def make_room(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        del running
        return missing


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that a lane of `num_tokens` tokens takes."""
    return -(-num_tokens // page_size)
