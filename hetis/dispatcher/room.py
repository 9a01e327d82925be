"""Pages: what a new sequence takes where, and whether it can be placed at all.

While its prompt is computed a sequence has its pages at home, wherever its lanes live (staging). A lane at home then
takes only its room to grow besides; one on a worker takes all its pages there.
"""

from collections.abc import Mapping
from typing import NamedTuple

from hetis.core.placement import FleetView, PoolId, Shortage, pages_for
from hetis.core.plan import Plan
from hetis.core.request import Sequence
from hetis.dispatcher.load import StageDevices, stage_devices

LARGEST_RESERVE = 0.5  # of a home's pages


class Pages(NamedTuple):
    """Of one lane."""

    now: int  # of all known tokens
    later: int  # with some room to grow

    @property
    def growth(self) -> int:
        return self.later - self.now


class Room:
    """Free pages, per stage and device, while sequences are placed one after the other."""

    def __init__(self, stages: list[StageDevices], view: FleetView) -> None:
        self._stages = stages
        self.free = [[view.free_pages[pool] for pool in stage.pools] for stage in stages]

    def take_prompt(self, pages: Pages) -> bool:
        """The prompt of a sequence, at its homes; False if it does not fit (then this object is of no more use)."""
        fits = True
        for free, stage in zip(self.free, self._stages, strict=True):
            for home in range(stage.num_homes):
                free[home] -= stage.most_lanes[home] * pages.now
                fits = fits and free[home] >= 0
        return fits

    def take_lanes(self, counts: list[list[int]], pages: Pages) -> None:
        """The lanes of a sequence, [stage][N], after its prompt."""
        for free, stage, row in zip(self.free, self._stages, counts, strict=True):
            for device, count in enumerate(row):
                free[device] -= count * (pages.growth if device < stage.num_homes else pages.later)

    def homeward(self, pages: Pages) -> list[list[int]] | None:
        """[stage][N] lanes of a sequence whose prompt is taken, as many at home as can grow there.

        None if that fails: then all placements do, since each takes as many pages of the workers, or more.
        """
        found = []
        for free, stage in zip(self.free, self._stages, strict=True):
            counts, left = [], stage.num_lanes
            for device, room in enumerate(free):
                need = pages.growth if device < stage.num_homes else pages.later
                fitting = max(0, room) // need if need else left
                counts.append(min(left, stage.most_lanes[device], fitting))
                left -= counts[-1]
            if left:
                return None
            found.append(counts)
        return found


def pages_of(sequence: Sequence, page_size: int) -> Pages:
    """Of all known tokens, and with one page more if the sequence can ever grow into it.

    The last token of a sequence is never computed, so it needs no place in the cache.
    """
    num_tokens = len(sequence.token_ids)
    longest = sequence.prompt_len + sequence.max_tokens - 1
    return Pages(pages_for(num_tokens, page_size), pages_for(min(num_tokens + page_size, longest), page_size))


def reserve(stage: StageDevices, home: int, view: FleetView, num_tokens: int) -> int:
    """Pages that a home keeps for prompts to come: those of one of `num_tokens`, but no large part of all it has."""
    pool = stage.pools[home]
    held = view.held_tokens[pool] // view.page_size + 2 * view.held_lanes[pool]  # about; each has one promised
    wanted = stage.most_lanes[home] * pages_for(num_tokens, view.page_size)
    return min(wanted, int(LARGEST_RESERVE * max(0, view.free_pages[pool] + held)))


def shortage_of(sequence: Sequence, view: FleetView) -> Shortage | None:
    """What keeps a sequence from being placed now; None if it fits.

    It is said of the homes: with so many pages more the sequence fits, however little room the workers have.
    """
    stages, pages = stage_devices(view.plan), pages_of(sequence, view.page_size)
    room = Room(stages, view)
    if room.take_prompt(pages) and room.homeward(pages) is not None:
        return None
    missing: dict[PoolId, int] = {}
    for stage in stages:
        on_workers = sum(max(0, view.free_pages[pool]) // pages.later for pool in stage.pools[stage.num_homes :])
        for pool, lanes in zip(stage.pools[: stage.num_homes], stage.most_lanes, strict=False):
            spare = view.free_pages[pool] - lanes * pages.now
            growing = lanes - max(0, spare) // pages.growth if pages.growth else 0
            away = min(on_workers, max(0, growing))
            on_workers -= away
            missing[pool] = max(0, -spare, (lanes - away) * pages.growth - spare)
    return Shortage({pool: count for pool, count in missing.items() if count > 0})


def lacking(sequence: Sequence, view: FleetView) -> str:
    """Why a sequence waits, in words, as far as pages are the reason."""
    return str(shortage_of(sequence, view) or "its rule leaves it no place now")


def shortage_when_empty(num_tokens: int, plan: Plan, num_pages: Mapping[int, int], page_size: int) -> Shortage | None:
    """What is missing for a sequence of `num_tokens` tokens even if it had the fleet for itself; None if it fits.

    Workers do not help: each home holds the whole prompt of all its head groups, as lanes or as staging (see
    `cost.memory.largest_context`).
    """
    pages = pages_for(num_tokens, page_size)
    missing = {PoolId(home.rank, stage): home.num_groups * pages - num_pages[home.rank] for stage, home in plan.homes}
    missing = {pool: count for pool, count in missing.items() if count > 0}
    return Shortage(missing) if missing else None
