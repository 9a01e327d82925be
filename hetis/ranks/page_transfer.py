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

from hetis.core.messages import StepCommand
from hetis.core.spans import Span
from hetis.ranks.pool import PagePool
from hetis_kernels import page_gather, page_scatter

STAGE, ROW, SOURCE, TARGET, FIRST, STOP = range(6)
Hauls = NDArray[np.int32]  # [n, 6]


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


def hauls_of(command: StepCommand, stage: int, groups: Span, num_groups: int) -> Hauls:
    """[n, 6] those that go over links of the primary that is the home of `groups`."""
    hauls = np.frombuffer(command.hauls, dtype=np.int32).reshape(-1, 6)
    group = hauls[:, ROW] % num_groups
    found: Hauls = hauls[(hauls[:, STAGE] == stage) & (group >= groups[0]) & (group < groups[1])]
    return found


def worker_haul(hauls: Hauls, pool: PagePool, home: int) -> LinkHaul:
    """For the worker's end of its link to `home`. `hauls`: of that home."""
    rank = pool.id.rank
    leaving, coming = _sorted(hauls, SOURCE, rank, home), _sorted(hauls, TARGET, rank, home)
    return LinkHaul(pool, _pages(pool, leaving), _pages(pool, coming), [], [])


def primary_hauls(hauls: Hauls, pool: PagePool, workers: list[int]) -> dict[int, LinkHaul]:
    """By worker, for the ends of a primary; workers that have no part in it are left out."""
    home = pool.id.rank
    relays: dict[tuple[int, int], Tensor] = {}
    for source, target in {(int(s), int(t)) for s, t in hauls[:, [SOURCE, TARGET]] if home not in (s, t)}:
        passing = hauls[(hauls[:, SOURCE] == source) & (hauls[:, TARGET] == target)]
        count = int((passing[:, STOP] - passing[:, FIRST]).sum())
        pages = pool.pages_L2PSD
        relays[source, target] = pages.new_empty(count, 1, 2, *pages.shape[3:])
    found = {}
    for worker in workers:
        to, back = _sorted(hauls, TARGET, worker, home), _sorted(hauls, SOURCE, worker, home)
        if len(to) or len(back):
            found[worker] = LinkHaul(
                pool,
                _pages(pool, to[to[:, SOURCE] == home]),
                _pages(pool, back[back[:, TARGET] == home]),
                [relays[pair] for pair in sorted(relays) if pair[1] == worker],
                [relays[pair] for pair in sorted(relays) if pair[0] == worker],
            )
    return found


def _sorted(hauls: Hauls, end: int, rank: int, home: int) -> Hauls:
    """Those that begin (or end) at `rank`: to or from the home first, then by the other end."""
    mine = hauls[hauls[:, end] == rank]
    other = mine[:, SOURCE + TARGET - end]
    ordered: Hauls = mine[np.lexsort((other, other != home))]
    return ordered


def _pages(pool: PagePool, hauls: Hauls) -> Tensor:
    """int32 [N] the pages of these hauls in a pool's own table."""
    pages = [pool.table_host_BW[row, first:stop] for _, row, _, _, first, stop in hauls]
    host = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *pages]))
    return host.to(pool.table_BW.device)
