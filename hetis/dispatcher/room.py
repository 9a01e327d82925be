"""Pages: how many a new sequence takes on which device, and whether it can be placed at all.

While its prompt is computed a sequence has its pages at home, wherever its lanes live (staging). Besides, a lane at
home takes only the pages to grow; one on a worker takes all its pages there.
"""

from collections.abc import Mapping
from typing import NamedTuple

from hetis.core.placement import FleetView, PoolId, Shortage, pages_for
from hetis.core.plan import Plan
from hetis.core.request import Sequence
from hetis.dispatcher.load import StageDevices, stage_devices

LARGEST_RESERVE = 0.5  # of a home's pages


class Pages(NamedTuple):
    """Pages of one lane."""

    now: int  # for all known tokens
    later: int  # with some to grow

    @property
    def growth(self) -> int:
        return self.later - self.now


class Room:
    """Free pages, per stage and device, while sequences are placed one after the other."""

    def __init__(self, stages: list[StageDevices], view: FleetView) -> None:
        self._stages = stages
        self.free = [[view.free_pages[pool] for pool in stage.pools] for stage in stages]

    def take_prompt(self, pages: Pages) -> bool:
        """Takes the pages of a prompt at the homes; False if it does not fit (do not use this object any more then)."""
        fits = True
        for free, stage in zip(self.free, self._stages, strict=True):
            for home in range(stage.num_homes):
                free[home] -= stage.most_lanes[home] * pages.now
                fits = fits and free[home] >= 0
        return fits

    def take_lanes(self, counts: list[list[int]], pages: Pages) -> None:
        """Takes the pages of a sequence's lanes, [stage][N], whose prompt is taken."""
        for free, stage, row in zip(self.free, self._stages, counts, strict=True):
            for device, count in enumerate(row):
                free[device] -= count * (pages.growth if device < stage.num_homes else pages.later)

    def most_at_home(self, pages: Pages) -> list[list[int]] | None:
        """[stage][N] lanes of a sequence whose prompt is taken, as many at home as can grow there.

        None if they do not fit: then no placement does, since any other takes at least as many pages of the workers.
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
    """Pages for all known tokens, and with one page more if the sequence can ever grow into it.

    The last token of a sequence is never computed, so it needs no cell.
    """
    num_tokens = len(sequence.token_ids)
    longest = sequence.prompt_len + sequence.max_tokens - 1
    return Pages(pages_for(num_tokens, page_size), pages_for(min(num_tokens + page_size, longest), page_size))


def reserve(stage: StageDevices, home: int, view: FleetView, num_tokens: int) -> int:
    """Pages that a home keeps for the next prompt, if of `num_tokens` tokens; at most `LARGEST_RESERVE` of all."""
    pool = stage.pools[home]
    held = view.held_tokens[pool] // view.page_size + 2 * view.held_lanes[pool]  # estimate: last page, one to grow
    wanted = stage.most_lanes[home] * pages_for(num_tokens, view.page_size)
    return min(wanted, int(LARGEST_RESERVE * max(0, view.free_pages[pool] + held)))


def shortage_of(sequence: Sequence, view: FleetView) -> Shortage | None:
    """Pages that homes lack to place a sequence now; None if it fits.

    With so many pages more at its homes, and those that workers have now, the sequence fits.
    """
    stages, pages = stage_devices(view.plan), pages_of(sequence, view.page_size)
    room = Room(stages, view)
    if room.take_prompt(pages) and room.most_at_home(pages) is not None:
        return None
    return Shortage({pool: count for stage in stages for pool, count in _missing(stage, pages, view) if count > 0})


def _missing(stage: StageDevices, pages: Pages, view: FleetView) -> list[tuple[PoolId, int]]:
    """(home, pages that it lacks) when lanes that cannot grow at home go to workers, as far as those have pages."""
    missing = []
    on_workers = sum(max(0, view.free_pages[pool]) // pages.later for pool in stage.pools[stage.num_homes :])
    for pool, lanes in zip(stage.pools[: stage.num_homes], stage.most_lanes, strict=False):
        spare = view.free_pages[pool] - lanes * pages.now
        growing = lanes - max(0, spare) // pages.growth if pages.growth else 0
        away = min(on_workers, max(0, growing))
        on_workers -= away
        missing.append((pool, max(0, -spare, (lanes - away) * pages.growth - spare)))
    return missing


def lacking(sequence: Sequence, view: FleetView) -> str:
    """The reason for the log why a sequence waits under a dispatcher that looks at pages alone."""
    return str(shortage_of(sequence, view) or "the policy of --dispatch leaves it no place now")


def shortage_when_empty(num_tokens: int, plan: Plan, num_pages: Mapping[int, int], page_size: int) -> Shortage | None:
    """Pages that a sequence of `num_tokens` tokens lacks even in an empty fleet; None if it fits.

    Workers do not help: each home holds the whole prompt of all its head groups, as lanes or as staging (see
    `cost.memory.largest_context`).
    """
    pages = pages_for(num_tokens, page_size)
    lacking_pages = {
        PoolId(home.rank, stage): home.num_groups * pages - num_pages[home.rank] for stage, home in plan.homes
    }
    missing = {pool: count for pool, count in lacking_pages.items() if count > 0}
    return Shortage(missing) if missing else None
