"""Link between two processes of one host, both with their tensors in CPU memory.

    counters   published and released of either direction, closed of either end; a page
    slots      primary -> worker: 2 x max bytes;   worker -> primary: 2 x max bytes

The sender writes a slot and advances `published`; the receiver reads it in place and advances `released`. A direction's
sender waits while published - released == 2, its receiver while published == what it has released. They wrap at 2^32.
"""

import os

import msgspec
import torch
from torch import Tensor

from hetis.comm.links.base import NUM_SLOTS, Link, check_agreement, check_size
from hetis.comm.rendezvous import Rendezvous
from hetis.comm.shared_memory import PAGE_BYTES, WORD_BYTES, Address, Peer, Segment, Waiter, default_spin_us

_COUNTERS = 3  # of one direction: published, released, closed by its sender
_SIZES = 2  # index of the first slot's message size, in 8 bytes behind the counter `published`
_MASK = 0xFFFFFFFF


class _Channel:
    """One direction, as one end sees it."""

    def __init__(self, segment: Segment, index: int, start: int, max_bytes: int) -> None:
        first = _COUNTERS * index
        self.published, self.released, self.closed = (segment.word(first + i) for i in range(_COUNTERS))
        self.max_bytes = max_bytes
        self.count = 0  # messages this end has sent, or received and released
        stride = _round_up(max_bytes)
        self._slots = [segment.memory_B[start + i * stride :][:max_bytes] for i in range(NUM_SLOTS)]
        self._views = list(self._slots)  # the same size comes again and again: keep the last view of each slot
        sizes = segment.memory_B[first * WORD_BYTES :][:WORD_BYTES].view(torch.int64)
        self._sizes = sizes.numpy().data  # in the cache line of `published`, behind the counter

    def view(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self.max_bytes)
        slot = self.count % NUM_SLOTS
        if self._views[slot].numel() != num_bytes:
            self._views[slot] = self._slots[slot][:num_bytes]
        return self._views[slot]

    @property
    def size(self) -> int:
        """Bytes of the current message, written by the sender."""
        return int(self._sizes[_SIZES + self.count % NUM_SLOTS])

    @size.setter
    def size(self, num_bytes: int) -> None:
        self._sizes[_SIZES + self.count % NUM_SLOTS] = num_bytes

    @property
    def full(self) -> int:
        """The value of `released` at which both slots are taken."""
        return (self.count - NUM_SLOTS) & _MASK


class ShmLink(Link):
    kind = "shm"

    def __init__(
        self, segment: Segment, peer: Peer, is_primary: bool, limits: tuple[int, int], spin_us: int | None = None
    ) -> None:
        """`limits`: largest message in bytes, to the worker and to the primary. `spin_us`: None: by cores and ranks."""
        self.segment, self._peer = segment, peer
        self._waiter = Waiter(default_spin_us() if spin_us is None else spin_us)
        to_worker = _Channel(segment, 0, PAGE_BYTES, limits[0])
        to_primary = _Channel(segment, 1, PAGE_BYTES + NUM_SLOTS * _round_up(limits[0]), limits[1])
        self._out, self._in = (to_worker, to_primary) if is_primary else (to_primary, to_worker)
        self._pending_bytes = 0
        self._is_closed = False

    def send_buffer(self, num_bytes: int) -> Tensor:
        channel = self._out
        view = channel.view(num_bytes)
        self._waiter.wait(channel.released, channel.full, self._check_peer)
        self._pending_bytes = num_bytes
        return view

    def send(self) -> None:
        channel = self._out
        channel.size = self._pending_bytes
        channel.count += 1
        self._waiter.publish(channel.published)
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        channel = self._in
        view = channel.view(num_bytes)
        self._waiter.wait(channel.published, channel.count & _MASK, self._check_peer)
        check_agreement(num_bytes, channel.size)
        self.bytes_received += num_bytes
        return view

    def release(self) -> None:
        channel = self._in
        channel.count += 1
        self._waiter.publish(channel.released)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._waiter.publish(self._out.closed)
        self._peer.close()
        self.segment.close()

    def _check_peer(self) -> None:
        if self._waiter.differs(self._in.closed, 0):
            raise ConnectionError(f"rank {self._peer.rank} (pid {self._peer.pid}) closed its link.")
        self._peer.check()


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


class _Offer(msgspec.Struct):
    address: Address
    limits: tuple[int, int]


def open_shm(
    rendezvous: Rendezvous,
    key: str,
    *,
    peer_rank: int,
    is_primary: bool,
    limits: tuple[int, int],
    timeout: float,
    spin_us: int | None = None,
) -> ShmLink:
    """Opens this rank's end; returns when both ends have the memory. The primary creates it.

    TimeoutError, naming the rendezvous key, if the peer does not come within `timeout` seconds.
    """
    if is_primary:
        segment = Segment.create(PAGE_BYTES + NUM_SLOTS * sum(map(_round_up, limits)))
        rendezvous.set(f"{key}/memory", msgspec.msgpack.encode(_Offer(segment.address, limits)))
        pid = int(rendezvous.get(f"{key}/attached", timeout))
    else:
        offer = msgspec.msgpack.decode(rendezvous.get(f"{key}/memory", timeout), type=_Offer)
        assert offer.limits == limits, f"the ends of {key} plan messages of {offer.limits} and {limits} bytes"
        segment, pid = Segment.attach(offer.address), offer.address.pid
        rendezvous.set(f"{key}/attached", str(os.getpid()).encode())
    return ShmLink(segment, Peer(peer_rank, pid), is_primary, limits, spin_us)
