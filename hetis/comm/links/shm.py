"""Link between two processes of one host, with messages in shared CPU memory.

    counters   per direction: published, released, closed by its sender; one page
    buffers    primary -> worker: 2 x max bytes;   worker -> primary: 2 x max bytes

The sender writes a buffer and advances `published`; the receiver reads it in place and advances `released`. The sender
waits while published - released == 2, the receiver while published == released. Counters wrap at 2^32.
"""

import os

import msgspec
import torch
from torch import Tensor

from hetis.comm.links.base import NUM_BUFFERS, Link, LinkEnd, check_agreement, check_size
from hetis.comm.shared_memory import PAGE_BYTES, WORD_BYTES, Address, Peer, Segment, Waiter, default_spin_us

_COUNTERS = 3  # per direction
_SIZES = 2  # index of the first buffer's message size among the 8-byte values at the counter `published`
_MASK = 0xFFFFFFFF


class _Channel:
    """One direction, as one end sees it."""

    def __init__(self, segment: Segment, index: int, start: int, max_bytes: int) -> None:
        first = _COUNTERS * index
        self.published, self.released, self.closed = (segment.word(first + i) for i in range(_COUNTERS))
        self.max_bytes = max_bytes
        self.count = 0  # messages this end has sent, or received and released
        stride = _round_up(max_bytes)
        self._buffers = [segment.memory_B[start + i * stride :][:max_bytes] for i in range(NUM_BUFFERS)]
        self._views = list(self._buffers)  # the last view of each buffer: sizes mostly repeat
        sizes = segment.memory_B[first * WORD_BYTES :][:WORD_BYTES].view(torch.int64)
        self._sizes = sizes.numpy().data  # behind the counter, in the cache line of `published`

    def view(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self.max_bytes)
        index = self.count % NUM_BUFFERS
        if self._views[index].numel() != num_bytes:
            self._views[index] = self._buffers[index][:num_bytes]
        return self._views[index]

    @property
    def size(self) -> int:
        """Bytes of the current message, written by the sender."""
        return int(self._sizes[_SIZES + self.count % NUM_BUFFERS])

    @size.setter
    def size(self, num_bytes: int) -> None:
        self._sizes[_SIZES + self.count % NUM_BUFFERS] = num_bytes

    @property
    def full(self) -> int:
        """Value of `released` at which both buffers are full."""
        return (self.count - NUM_BUFFERS) & _MASK


class ShmLink(Link):
    kind = "shm"

    def __init__(
        self, segment: Segment, peer: Peer, is_primary: bool, limits: tuple[int, int], spin_us: int | None = None
    ) -> None:
        """`limits`: bytes of the largest message to the worker and to the primary. `spin_us`: None: by cores, ranks."""
        self.segment, self._peer = segment, peer
        self._waiter = Waiter(default_spin_us() if spin_us is None else spin_us)
        to_worker = _Channel(segment, 0, PAGE_BYTES, limits[0])
        to_primary = _Channel(segment, 1, PAGE_BYTES + NUM_BUFFERS * _round_up(limits[0]), limits[1])
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


def open_shm(end: LinkEnd, spin_us: int | None = None) -> ShmLink:
    """Opens one end; returns when both ends have mapped the memory, which the primary creates.

    TimeoutError, naming the rendezvous key, if the peer does not open its end.
    """
    key, limits = end.key, end.limits
    if end.is_primary:
        segment = Segment.create(PAGE_BYTES + NUM_BUFFERS * sum(map(_round_up, limits)))
        end.rendezvous.set(f"{key}/memory", msgspec.msgpack.encode(_Offer(segment.address, limits)))
        pid = int(end.rendezvous.get(f"{key}/attached", end.timeout))
    else:
        offer = msgspec.msgpack.decode(end.rendezvous.get(f"{key}/memory", end.timeout), type=_Offer)
        assert offer.limits == limits, f"the ends of {key} plan messages of {offer.limits} and {limits} bytes"
        segment, pid = Segment.attach(offer.address), offer.address.pid
        end.rendezvous.set(f"{key}/attached", str(os.getpid()).encode())
    return ShmLink(segment, Peer(end.peer_rank, pid), end.is_primary, limits, spin_us)
