"""The hauler, device half: pages of lanes on the move, as passengers of a step's messages (`cache/migration.py`).

The message of a layer brings a primary's pages of the layer before, for that one has been appended to; after the last
layer comes one message more. A reply brings the worker's pages of its own layer. In a message the pages from or to the
primary itself come first, then those that it passes on, by the rank at their other end: both ends sort alike.

    worker A -> primary -> worker B    layer l arrives with A's reply of layer l and goes on with B's next message
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetis.core.messages.step_command import Int32, Transfers
from hetis.core.spans import Span
from hetis.ranks.pool import PagePool
from hetis_kernels import page_gather, page_scatter


@dataclass(frozen=True, slots=True)
class LinkHaul:
    """What one link carries in each layer of a step, seen from one of its ends. N pages, [1, 2, S, D] each."""

    pool: PagePool
    out_page_N: Tensor  # int32, of the own pool
    in_page_N: Tensor
    out_relays: list[Tensor]  # [N, 1, 2, S, D], to be passed on; primaries only
    in_relays: list[Tensor]

    @property
    def num_out(self) -> int:
        return len(self.out_page_N) + sum(map(len, self.out_relays))

    @property
    def num_in(self) -> int:
        return len(self.in_page_N) + sum(map(len, self.in_relays))

    def write(self, layer: int, pages_N12SD: Tensor) -> None:
        """One layer's pages into a message."""
        begin = len(self.out_page_N)
        page_gather(self.pool.pages_L2PSD[layer : layer + 1], self.out_page_N, pages_N12SD[:begin])
        for relay in self.out_relays:
            pages_N12SD[begin : begin + len(relay)] = relay
            begin += len(relay)

    def read(self, layer: int, pages_N12SD: Tensor) -> None:
        """One layer's pages out of a message."""
        begin = len(self.in_page_N)
        page_scatter(pages_N12SD[:begin], self.in_page_N, self.pool.pages_L2PSD[layer : layer + 1])
        for relay in self.in_relays:
            relay.copy_(pages_N12SD[begin : begin + len(relay)])
            begin += len(relay)


def no_haul(pool: PagePool) -> LinkHaul:
    nothing = torch.empty(0, dtype=torch.int32, device=pool.table_BW.device)
    return LinkHaul(pool, nothing, nothing, [], [])


def hauls_of(transfers: Transfers, stage: int, groups: Span, num_groups: int) -> Transfers:
    """Those that go over links of the primary that is the home of `groups`."""
    group_N = transfers.lane_N % num_groups
    return transfers.select((transfers.stage_N == stage) & (group_N >= groups[0]) & (group_N < groups[1]))


def worker_haul(hauls: Transfers, pool: PagePool, home: int) -> LinkHaul:
    """For the worker's end of its link to `home`. `hauls`: of that home."""
    if not hauls.lane_N.size:  # as in most steps
        return no_haul(pool)
    leaving, coming = _sent(hauls, pool.id.rank, home), _received(hauls, pool.id.rank, home)
    return LinkHaul(pool, _pages(pool, leaving), _pages(pool, coming), [], [])


def primary_hauls(hauls: Transfers, pool: PagePool, workers: list[int]) -> dict[int, LinkHaul]:
    """By worker, for the ends of a primary; workers that have no part in it are left out."""
    if not hauls.lane_N.size:  # as in most steps
        return {}
    home = pool.id.rank
    relays: dict[tuple[int, int], Tensor] = {}
    for source, target in set(zip(hauls.source_N.tolist(), hauls.target_N.tolist(), strict=True)):
        if home not in (source, target):
            passing = hauls.select((hauls.source_N == source) & (hauls.target_N == target))
            pages = pool.pages_L2PSD
            relays[source, target] = pages.new_empty(passing.num_pages, 1, 2, *pages.shape[3:])
    found = {}
    for worker in workers:
        to, back = _received(hauls, worker, home), _sent(hauls, worker, home)
        if len(to.lane_N) or len(back.lane_N):
            found[worker] = LinkHaul(
                pool,
                _pages(pool, to.select(to.source_N == home)),
                _pages(pool, back.select(back.target_N == home)),
                [relays[pair] for pair in sorted(relays) if pair[1] == worker],
                [relays[pair] for pair in sorted(relays) if pair[0] == worker],
            )
    return found


def _sent(hauls: Transfers, rank: int, home: int) -> Transfers:
    """Those from `rank`: to the home first, then by target."""
    mine = hauls.select(hauls.source_N == rank)
    return mine.select(_order(mine.target_N, home))


def _received(hauls: Transfers, rank: int, home: int) -> Transfers:
    """Those to `rank`: from the home first, then by source."""
    mine = hauls.select(hauls.target_N == rank)
    return mine.select(_order(mine.source_N, home))


def _order(other_N: Int32, home: int) -> NDArray[np.intp]:
    return np.lexsort((other_N, other_N != home))


def _pages(pool: PagePool, hauls: Transfers) -> Tensor:
    """int32 [N] the pages of these hauls in a pool's own table."""
    spans = zip(hauls.lane_N, hauls.first_N, hauls.stop_N, strict=True)
    pages = [pool.table_host_BW[lane, first:stop] for lane, first, stop in spans]
    host = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *pages]))
    return host.to(pool.table_BW.device)
