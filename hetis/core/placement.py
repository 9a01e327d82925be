"""Where the lanes of a sequence live, and what a dispatcher gets to see when it decides that."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from hetis.core.plan import Plan
from hetis.core.request import Sequence


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """`owners[stage][group]` is a rank: the group's home primary or any attention worker."""

    owners: tuple[tuple[int, ...], ...]


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One lane goes to another rank."""

    slot: int
    stage: int
    group: int
    source: int
    target: int


class PoolId(msgspec.Struct, frozen=True, order=True):
    """One page pool: the pages of `rank` for the layers of `stage`. A home has one, a worker one per stage."""

    rank: int
    stage: int


def pools_of(plan: Plan) -> list[PoolId]:
    """Pools of all homes, stage by stage, then those of each worker."""
    homes = [PoolId(home.rank, stage) for stage, home in plan.homes]
    return homes + [PoolId(rank, stage) for rank in plan.worker_ranks for stage in range(len(plan.stages))]


class Shortage(msgspec.Struct, frozen=True):
    """Pages that are missing, per pool."""

    missing: Mapping[PoolId, int]

    def __str__(self) -> str:
        pools = sorted(self.missing.items())
        return ", ".join(
            f"rank {pool.rank} lacks {count} {'page' if count == 1 else 'pages'} for stage {pool.stage}"
            for pool, count in pools
        )


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the cache when sequences are to be placed."""

    plan: Plan
    page_size: int
    free_pages: Mapping[PoolId, int]  # less one page for every lane there, for running sequences to grow; may be < 0
    held_lanes: Mapping[PoolId, int]  # lanes that live there, or will when they arrive; staging does not count
    held_tokens: Mapping[PoolId, int]  # of these lanes


class Dispatcher(Protocol):
    """Decides where lanes live. A function of data: the same view gives the same placements."""

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        """A placement for each new sequence, in order of arrival; None where there is none now.

        All placements together fit into `view.free_pages`: the pages of `token_ids` and some to grow with the owners,
        and of `token_ids` in staging with the homes of lanes that live elsewhere.
        """
        ...

    def why_not(self, sequence: Sequence, view: FleetView) -> str:
        """Why a sequence that got no placement waits, in words for the log."""
        ...


class Relief(Protocol):
    """Makes room where pages run out, without making a sequence start over."""

    @property
    def is_busy(self) -> bool:
        """Whether lanes are on the move, so that steps without rows bring them on."""
        ...

    def make_room(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        """Has lanes move off these pools. What it cannot find: for that a sequence has to start over (or to wait).

        The rest is there when it returns, or comes with lanes that leave; then `is_busy` is true.
        """
        ...


class NoRelief:
    """Lanes stay where they are."""

    is_busy = False

    def make_room(self, missing: Mapping[PoolId, int], running: Iterable[Sequence]) -> Mapping[PoolId, int]:
        del running
        return missing


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages of one lane of `num_tokens` tokens."""
    return -(-num_tokens // page_size)
