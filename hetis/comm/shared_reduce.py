"""Tensor parallelism of CPU ranks on one host, through shared memory.

    counters   one per rank: its arrivals;  one per rank: closed
    buffers    two per rank, used in turn

In an exchange, a rank writes its part into its buffer, counts its arrival, waits for all others and reads all parts.
A buffer is written again only after all ranks have arrived at the next exchange, hence have read it. So two buffers
per rank suffice, and no rank waits for readers.
"""

import math
import os
from collections.abc import Sequence
from functools import lru_cache, partial

import msgspec
import torch
from torch import Tensor

from hetis.comm import collectives
from hetis.comm.collectives import TensorParallel, sum_in_order
from hetis.comm.rendezvous import Rendezvous
from hetis.comm.shared_memory import PAGE_BYTES, WORD_BYTES, Address, Peer, Segment, Waiter, default_spin_us

BUFFER_BYTES = 1 << 20  # larger tensors take several exchanges, which keeps all buffers in the shared cache
_MASK = 0xFFFFFFFF
_ALIGNMENT = 16  # elements, between shares


class SharedTensorParallel(TensorParallel):
    def __init__(self, segment: Segment, peers: Sequence[Peer], index: int, spin_us: int | None = None) -> None:
        """`peers`: all ranks of the stage in order, this one included."""
        self.index, self.size = index, len(peers)
        self._segment, self._peers = segment, list(peers)
        self._arrived = [segment.word(i) for i in range(self.size)]
        self._closed = [segment.word(self.size + i) for i in range(self.size)]
        first = _header_bytes(self.size)
        self._buffers = [
            [segment.memory_B[first + (2 * i + turn) * BUFFER_BYTES :][:BUFFER_BYTES] for turn in range(2)]
            for i in range(self.size)
        ]
        self._waiter = Waiter(default_spin_us() if spin_us is None else spin_us)
        self._count = 0  # exchanges so far
        self._part = lru_cache(256)(self._make_part)  # making a view costs more than the exchange

    def all_reduce(self, x: Tensor) -> None:
        assert x.is_contiguous()
        for part_N in torch.split(x.view(-1), BUFFER_BYTES // x.element_size()):
            if self.size > 2 and part_N.numel() * part_N.element_size() >= collectives.SHARED_SUM_BYTES:
                self._sum_shares(part_N)
            elif part_N.numel() > 0:
                turn = self._exchange(part_N)
                sum_in_order([self._part(i, turn, part_N.shape, x.dtype) for i in range(self.size)], part_N)

    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        assert x_NV.shape[1] == widths[self.index]
        num_rows, widest, capacity = len(x_NV), max(widths), BUFFER_BYTES // x_NV.element_size()
        out_NV = x_NV.new_empty(num_rows, sum(widths)) if self.index == 0 else None
        num_columns = min(widest, capacity)
        for top in range(0, num_rows, capacity // num_columns):
            rows = slice(top, min(num_rows, top + capacity // num_columns))
            for left in range(0, widest, num_columns):
                turn = self._exchange(x_NV[rows, left : left + num_columns])
                if out_NV is not None:
                    self._collect(turn, out_NV[rows], widths, left, num_columns)
        return out_NV

    def broadcast(self, x: Tensor) -> None:
        assert x.is_contiguous()
        for part_N in torch.split(x.view(-1), BUFFER_BYTES // x.element_size()):
            if part_N.numel():
                part_N.copy_(self._part(0, self._exchange(part_N), part_N.shape, x.dtype))

    def close(self) -> None:
        self._waiter.publish(self._closed[self.index])
        for peer in self._peers:
            peer.close()
        self._segment.close()

    def _exchange(self, mine: Tensor) -> int:
        """Publishes `mine` and waits for the parts of all ranks; returns which of their two buffers holds them."""
        turn = self._count % 2
        self._part(self.index, turn, mine.shape, mine.dtype).copy_(mine)
        self._waiter.publish(self._arrived[self.index])
        for i in range(self.size):
            if i != self.index:
                self._waiter.wait(self._arrived[i], self._count & _MASK, partial(self._check, i))
        self._count += 1
        return turn

    def _make_part(self, index: int, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """View of the part that rank `index` publishes in this turn."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._buffers[index][turn][:num_bytes].view(dtype).view(shape)

    def _sum_shares(self, x_N: Tensor) -> None:
        """Reduce-scatter, then all-gather: every rank sums one share of `x_N`."""
        turn, size = self._exchange(x_N), x_N.numel()
        step = -(-size // (self.size * _ALIGNMENT)) * _ALIGNMENT
        shares = [slice(min(size, i * step), min(size, (i + 1) * step)) for i in range(self.size)]
        parts = [self._part(i, turn, (size,), x_N.dtype) for i in range(self.size)]
        mine = x_N[shares[self.index]]
        sum_in_order([part[shares[self.index]] for part in parts], mine)
        turn = self._exchange(mine)
        for i, share in enumerate(shares):
            if i != self.index:
                target = x_N[share]
                target.copy_(self._part(i, turn, target.shape, x_N.dtype))

    def _collect(self, turn: int, out_NV: Tensor, widths: Sequence[int], left: int, num_columns: int) -> None:
        """Copies columns `left` to `left + num_columns` of every rank to their places in `out_NV`."""
        begin = 0
        for i, width in enumerate(widths):
            here = min(max(0, width - left), num_columns)
            first = begin + left
            out_NV[:, first : first + here] = self._part(i, turn, (len(out_NV), here), out_NV.dtype)
            begin += width

    def _check(self, index: int) -> None:
        peer = self._peers[index]
        if self._waiter.differs(self._closed[index], 0):
            raise ConnectionError(f"rank {peer.rank} (pid {peer.pid}) left its stage.")
        peer.check()


def open_shared(
    rendezvous: Rendezvous, key: str, ranks: Sequence[int], index: int, timeout: float, spin_us: int | None = None
) -> SharedTensorParallel:
    """Joins the stage of `ranks` as member `index`; returns when all members have mapped the memory of index 0.

    TimeoutError, naming the rendezvous key, if a member does not join within `timeout` seconds.
    """
    if index == 0:
        segment = Segment.create(_header_bytes(len(ranks)) + 2 * len(ranks) * BUFFER_BYTES)
        rendezvous.set(f"{key}/memory", msgspec.msgpack.encode(segment.address))
    else:
        segment = Segment.attach(msgspec.msgpack.decode(rendezvous.get(f"{key}/memory", timeout), type=Address))
    rendezvous.set(f"{key}/pid/{index}", str(os.getpid()).encode())
    pids = [int(rendezvous.get(f"{key}/pid/{i}", timeout)) for i in range(len(ranks))]
    peers = [Peer(rank, pid) for rank, pid in zip(ranks, pids, strict=True)]
    return SharedTensorParallel(segment, peers, index, spin_us)


def _header_bytes(size: int) -> int:
    return -(-2 * size * WORD_BYTES // PAGE_BYTES) * PAGE_BYTES
