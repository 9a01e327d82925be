"""Page transfers on the ranks: pages of migrating lanes cross links as messages of their own (`cache/migration.py`).

A layer of a step ends with an exchange of that layer's pages, when its K and V have been appended and its replies are
there. First every worker sends pages to its homes, then every home sends to the workers: its own pages, and those that
it relays from another worker. What would be empty is not sent.

    worker A -> home -> worker B    within the exchange of one layer

Order. All messages of a stage have one order: by step, layer, phase (requests and replies, pages to homes, pages to
workers), home, kind (request before reply) and worker. Every rank sends and receives its own messages in this order, so
the next message in it always finds both ends ready: no acknowledgement is needed and no deadlock possible, even over
links that hold no message back. Within a message, the pages from or to the home's own pool come first, then relayed
ones by the rank at their other end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetis.comm.links.base import Link
from hetis.core.messages.step_command import Int32, Step, Transfers
from hetis.core.plan import Primary
from hetis.core.spans import Span
from hetis.core.step_times import Activity
from hetis.ranks.pool import PagePool
from hetis_kernels import page_gather, page_scatter

Lap = Callable[[Activity], object]


@dataclass(frozen=True, slots=True)
class LinkTransfer:
    """Pages that a link carries in each layer of a step, seen from one of its ends. N pages, [1, 2, S, D] each."""

    pool: PagePool
    link: Link
    out_page_N: Tensor  # int32, of the own pool
    in_page_N: Tensor
    out_relays: list[Tensor]  # [N, 1, 2, S, D], sent on in the exchange in which they come; homes only
    in_relays: list[Tensor]

    @property
    def num_out(self) -> int:
        return len(self.out_page_N) + sum(map(len, self.out_relays))

    @property
    def num_in(self) -> int:
        return len(self.in_page_N) + sum(map(len, self.in_relays))

    def send(self, layer: int) -> None:
        """Sends the pages of a layer."""
        pages_N12SD = self._pages(self.link.send_buffer(self._num_bytes(self.num_out)))
        begin = len(self.out_page_N)
        page_gather(self.pool.pages_L2PSD[layer : layer + 1], self.out_page_N, pages_N12SD[:begin])
        for relay in self.out_relays:
            pages_N12SD[begin : begin + len(relay)] = relay
            begin += len(relay)
        self.link.send()

    def receive(self, layer: int, lap: Lap) -> None:
        """Takes in the pages of a layer; the wait for them is a lap of its own."""
        pages_N12SD = self._pages(self.link.recv(self._num_bytes(self.num_in)))
        lap(Activity.WAIT)
        begin = len(self.in_page_N)
        page_scatter(pages_N12SD[:begin], self.in_page_N, self.pool.pages_L2PSD[layer : layer + 1])
        for relay in self.in_relays:
            relay.copy_(pages_N12SD[begin : begin + len(relay)])
            begin += len(relay)
        self.link.release()

    def _num_bytes(self, num_pages: int) -> int:
        return num_pages * self.pool.pages_L2PSD[0, :, 0].nbytes

    def _pages(self, message: Tensor) -> Tensor:
        pages = self.pool.pages_L2PSD
        return message.view(pages.dtype).view(-1, 1, 2, *pages.shape[3:])


class _StageTransfers:
    """The transfers of one rank and stage in the current step."""

    def __init__(self, lap: Lap) -> None:
        self._lap = lap
        self._transfers: list[LinkTransfer] = []

    @property
    def num_pages(self) -> int:
        """Pages of a layer, sent and received."""
        return sum(transfer.num_out + transfer.num_in for transfer in self._transfers)

    def _send(self, layer: int) -> None:
        for transfer in self._transfers:
            if transfer.num_out:
                transfer.send(layer)
                self._lap(Activity.MIGRATION)

    def _receive(self, layer: int) -> None:
        for transfer in self._transfers:
            if transfer.num_in:
                transfer.receive(layer, self._lap)
                self._lap(Activity.MIGRATION)


class HomeTransfers(_StageTransfers):
    """The transfers of a primary with the workers."""

    def __init__(self, pool: PagePool, links: Mapping[int, Link], groups: Span, num_groups: int, lap: Lap) -> None:
        """`links`: by worker, in the order of the plan. `groups`: at home here, of `num_groups` in all."""
        super().__init__(lap)
        self._pool, self._links, self._groups, self._num_groups = pool, links, groups, num_groups

    def begin(self, step: Step) -> None:
        """Begins a step whose page table entries the pool has applied."""
        transfers = transfers_of(step.transfers, self._pool.id.stage, self._groups, self._num_groups)
        self._transfers = home_transfers(transfers, self._pool, self._links)

    def exchange(self, layer: int) -> None:
        self._receive(layer)
        self._send(layer)


class WorkerTransfers(_StageTransfers):
    """The transfers of a worker with the homes of one stage."""

    def __init__(self, pool: PagePool, homes: Sequence[tuple[Primary, Link]], num_groups: int, lap: Lap) -> None:
        """`homes`: in tensor-parallel order."""
        super().__init__(lap)
        self._pool, self._homes, self._num_groups = pool, homes, num_groups

    def begin(self, step: Step) -> None:
        """Begins a step whose page table entries the pool has applied."""
        self._transfers = []
        for home, link in self._homes:
            transfers = transfers_of(step.transfers, self._pool.id.stage, home.groups, self._num_groups)
            if transfers.lane_N.size:
                self._transfers.append(worker_transfer(transfers, self._pool, link, home.rank))

    def exchange(self, layer: int) -> None:
        self._send(layer)
        self._receive(layer)


def transfers_of(transfers: Transfers, stage: int, groups: Span, num_groups: int) -> Transfers:
    """The transfers that cross links of the primary that is the home of `groups`."""
    if not transfers.lane_N.size:  # as in most steps
        return transfers
    group_N = transfers.lane_N % num_groups
    return transfers.select((transfers.stage_N == stage) & (group_N >= groups[0]) & (group_N < groups[1]))


def worker_transfer(transfers: Transfers, pool: PagePool, link: Link, home: int) -> LinkTransfer:
    """The worker's end of its link to `home`. `transfers`: of that home."""
    rank = pool.id.rank
    return LinkTransfer(
        pool, link, _pages(pool, _sent(transfers, rank, home)), _pages(pool, _received(transfers, rank, home)), [], []
    )


def home_transfers(transfers: Transfers, pool: PagePool, links: Mapping[int, Link]) -> list[LinkTransfer]:
    """The home's ends of its links, in their order; links that carry no pages are left out."""
    if not transfers.lane_N.size:
        return []
    home = pool.id.rank
    relays = _relays(transfers, pool)
    found = []
    for worker, link in links.items():
        out, coming = _received(transfers, worker, home), _sent(transfers, worker, home)
        if out.lane_N.size or coming.lane_N.size:
            found.append(
                LinkTransfer(
                    pool,
                    link,
                    _pages(pool, out.select(out.source_N == home)),
                    _pages(pool, coming.select(coming.target_N == home)),
                    [relays[pair] for pair in sorted(relays) if pair[1] == worker],
                    [relays[pair] for pair in sorted(relays) if pair[0] == worker],
                )
            )
    return found


def _relays(transfers: Transfers, pool: PagePool) -> dict[tuple[int, int], Tensor]:
    """Memory for the pages of a layer from worker to worker, by (source, target)."""
    home, pages, relays = pool.id.rank, pool.pages_L2PSD, {}
    for source, target in set(zip(transfers.source_N.tolist(), transfers.target_N.tolist(), strict=True)):
        if home not in (source, target):
            relayed = transfers.select((transfers.source_N == source) & (transfers.target_N == target))
            relays[source, target] = pages.new_empty(relayed.num_pages, 1, 2, *pages.shape[3:])
    return relays


def _sent(transfers: Transfers, rank: int, home: int) -> Transfers:
    """The transfers from `rank`: to the home first, then by target."""
    own = transfers.select(transfers.source_N == rank)
    return own.select(_order(own.target_N, home))


def _received(transfers: Transfers, rank: int, home: int) -> Transfers:
    """The transfers to `rank`: from the home first, then by source."""
    own = transfers.select(transfers.target_N == rank)
    return own.select(_order(own.source_N, home))


def _order(other_N: Int32, home: int) -> NDArray[np.intp]:
    return np.lexsort((other_N, other_N != home))


def _pages(pool: PagePool, transfers: Transfers) -> Tensor:
    """int32 [N] the pages of these transfers in a pool's own table."""
    spans = zip(transfers.lane_N, transfers.first_N, transfers.stop_N, strict=True)
    pages = [pool.table_host_BW[lane, first:stop] for lane, first, stop in spans]
    host = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *pages]))
    return host.to(pool.table_BW.device)
