"""Migration, driver side: selects the pages that travel with the next step, and says which lanes have arrived.

Pages ride along with the messages of a step, layer by layer, a bounded number per link and direction. Full pages go
first, while the lane grows at its source; the last haul of a lane takes all that is left, including the tokens that are
appended in its own step, for ranks copy a layer's pages after they have appended to it. With the next command, before
anything more can be appended, the lane lives at its target. Every rank obeys commands in order, so a page that is given
to another lane by a later command has been read, or written, by then: a move can be forgotten at any time.

A lane goes over the link between its home and a worker; from worker to worker over both, by way of its home.
"""

from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import NamedTuple

from hetis.cache.cache_manager import CacheManager
from hetis.cache.lanes import Transit
from hetis.core.messages.step_command import PageTransfer
from hetis.core.placement import Move, PoolId, pages_for
from hetis.core.plan import Plan


class _Leg(NamedTuple):
    """A link that a lane takes, and which way."""

    home: int
    worker: int
    to_worker: bool


class Hauler:
    """Carries lanes from rank to rank."""

    def __init__(
        self,
        cache: CacheManager,
        plan: Plan,
        num_groups: int,
        page_size: int,
        token_bytes: int,
        pages_per_haul: int,
    ) -> None:
        """`token_bytes`: of one lane in one layer. `pages_per_haul`: most that a link carries each way in one step."""
        self._cache, self._num_groups, self._page_size = cache, num_groups, page_size
        self._homes = plan.home_ranks
        self._pages_per_haul = pages_per_haul
        self._layer_bytes = page_size * token_bytes  # of a page
        self._num_layers = [stage.num_layers for stage in plan.stages]
        self.num_landed = 0  # lanes
        self.bytes_sent = 0  # once for each page, however many links it takes

    @property
    def is_busy(self) -> bool:
        return bool(self._cache.transits())

    def start(self, moves: Iterable[Move]) -> list[Move]:
        """Begins those for which there are pages; the others are left out."""
        return [move for move in moves if self._cache.begin_move(move) is None]

    def land(self) -> list[Move]:
        """Lanes that live at their targets from the next command on, whatever else it says."""
        arrived = [transit for transit, _ in self._cache.transits() if transit.is_complete]
        for transit in arrived:
            self._cache.commit(transit)
        self.num_landed += len(arrived)
        return [transit.move for transit in arrived]

    def cancel_into(self, pools: Collection[PoolId]) -> None:
        """Forgets moves into these pools: lanes stay where they are, and their pages there are free at once."""
        for transit, _ in self._cache.transits():
            if transit.part.pool in pools:
                self._cache.cancel(transit)

    def plan(self, most_bytes: Mapping[int, float]) -> list[PageTransfer]:
        """What goes with the next command, in which sequences have the tokens that the cache knows of.

        `most_bytes`: by worker, that its links should carry with each message, each way; a page goes in any case.
        """
        left: dict[_Leg, int] = {}  # pages
        hauls: list[PageTransfer] = []
        for transit, num_tokens in self._cache.transits():
            legs = self._legs(transit.move)
            for leg in legs:
                left.setdefault(leg, self._most_pages(most_bytes.get(leg.worker, inf)))
            count = self._count(transit, num_tokens, min(left[leg] for leg in legs))
            if count:
                for leg in legs:
                    left[leg] -= count
                hauls.append(self._haul(transit, count))
        return hauls

    def _most_pages(self, most_bytes: float) -> int:
        return max(1, int(min(self._pages_per_haul, most_bytes / self._layer_bytes)))

    def _legs(self, move: Move) -> list[_Leg]:
        home = self._homes[move.stage][move.group]
        legs = (_Leg(home, move.source, to_worker=False), _Leg(home, move.target, to_worker=True))
        return [leg for leg in legs if leg.worker != home]

    def _count(self, transit: Transit, num_tokens: int, room: int) -> int:
        """Pages to send now: all that are left, if they fit, or else some that are full and will not change."""
        rest = pages_for(num_tokens, self._page_size) - transit.num_sent
        if rest <= room:
            transit.is_complete = True
            return rest
        return min(room, num_tokens // self._page_size - transit.num_sent)

    def _haul(self, transit: Transit, count: int) -> PageTransfer:
        move, first = transit.move, transit.num_sent
        transit.num_sent += count
        self.bytes_sent += count * self._layer_bytes * self._num_layers[move.stage]
        lane = move.slot * self._num_groups + move.group
        return PageTransfer(move.stage, lane, move.source, move.target, first, first + count)
