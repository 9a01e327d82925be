"""Migration, driver side: selects the pages to transfer with the next step, and commits finished migrations.

Pages are transferred during a step, layer by layer, a bounded number per link and direction. Full pages go first, while
the lane grows at its source; the last transfer of a lane takes all that is left, including the tokens that are appended
in its own step, for ranks copy a layer's pages after they have appended to it. With the next command, before anything
more can be appended, the lane lives at its target. Every rank obeys commands in order, so a page that is given to
another lane by a later command has been read, or written, by then: a migration can be cancelled at any time.

A lane crosses the link between its home and a worker; from worker to worker both of their links, by way of its home.
"""

from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import NamedTuple

from hetis.cache.cache_manager import CacheManager
from hetis.cache.lanes import Transit
from hetis.core.messages.step_command import PageTransfer
from hetis.core.placement import Move, PoolId, pages_for
from hetis.core.plan import Plan


class _LinkDirection(NamedTuple):
    """A link that a lane crosses, and which way."""

    home: int
    worker: int
    to_worker: bool


class Migrator:
    """Migrates lanes from rank to rank."""

    def __init__(
        self,
        cache: CacheManager,
        plan: Plan,
        num_groups: int,
        page_size: int,
        token_bytes: int,
        max_pages: int,
    ) -> None:
        """`token_bytes`: K and V of one lane in one layer. `max_pages`: per step, over one link one way."""
        self._cache, self._num_groups, self._page_size = cache, num_groups, page_size
        self._homes = plan.home_ranks
        self._max_pages = max_pages
        self._layer_bytes = page_size * token_bytes  # of a page
        self._num_layers = [stage.num_layers for stage in plan.stages]
        self.num_committed = 0  # lanes
        self.bytes_sent = 0  # once for each page, however many links it crosses

    @property
    def is_busy(self) -> bool:
        return bool(self._cache.transits())

    def start(self, moves: Iterable[Move]) -> list[Move]:
        """Starts the moves whose targets have free pages, and returns them; the others are left out."""
        return [move for move in moves if self._cache.begin_move(move) is None]

    def commit(self) -> list[Move]:
        """Moves whose lanes live at their targets from the next command on, whatever else it says."""
        complete = [transit for transit, _ in self._cache.transits() if transit.is_complete]
        for transit in complete:
            self._cache.commit(transit)
        self.num_committed += len(complete)
        return [transit.move for transit in complete]

    def cancel_into(self, pools: Collection[PoolId]) -> None:
        """Cancels migrations into these pools: lanes stay where they are, and their pages there are free at once."""
        for transit, _ in self._cache.transits():
            if transit.part.pool in pools:
                self._cache.cancel(transit)

    def plan(self, max_bytes: Mapping[int, float]) -> list[PageTransfer]:
        """Transfers of the next step, in which sequences have the tokens that the cache knows of.

        `max_bytes`: by worker, of one layer's pages over one of its links one way; a page is sent in any case.
        """
        room: dict[_LinkDirection, int] = {}  # pages
        transfers: list[PageTransfer] = []
        for transit, num_tokens in self._cache.transits():
            directions = self._directions(transit.move)
            for direction in directions:
                room.setdefault(direction, self._page_limit(max_bytes.get(direction.worker, inf)))
            count = self._count(transit, num_tokens, min(room[direction] for direction in directions))
            if count:
                for direction in directions:
                    room[direction] -= count
                transfers.append(self._transfer(transit, count))
        return transfers

    def _page_limit(self, max_bytes: float) -> int:
        return max(1, int(min(self._max_pages, max_bytes / self._layer_bytes)))

    def _directions(self, move: Move) -> list[_LinkDirection]:
        home = self._homes[move.stage][move.group]
        directions = (
            _LinkDirection(home, move.source, to_worker=False),
            _LinkDirection(home, move.target, to_worker=True),
        )
        return [direction for direction in directions if direction.worker != home]

    def _count(self, transit: Transit, num_tokens: int, room: int) -> int:
        """Pages to send now: all that are left, if they fit, or else some that are full and will not change."""
        rest = pages_for(num_tokens, self._page_size) - transit.num_sent
        if rest <= room:
            transit.is_complete = True
            return rest
        return min(room, num_tokens // self._page_size - transit.num_sent)

    def _transfer(self, transit: Transit, count: int) -> PageTransfer:
        move, first = transit.move, transit.num_sent
        transit.num_sent += count
        self.bytes_sent += count * self._layer_bytes * self._num_layers[move.stage]
        lane = move.slot * self._num_groups + move.group
        return PageTransfer(move.stage, lane, move.source, move.target, first, first + count)
