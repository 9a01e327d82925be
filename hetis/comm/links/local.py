"""Link between two threads of one process and one device, for tests and for roles that share a process.

Threads on a GPU may have streams of their own, so each buffer has the events after which it may be read and written.
"""

import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hetis.comm.links.base import NUM_BUFFERS, Link, LinkEnd, check_agreement, check_size
from hetis.comm.streams import StreamEvent


@dataclass(frozen=True, slots=True)
class _Buffer:
    memory_B: Tensor
    written: StreamEvent
    read: StreamEvent

    @classmethod
    def allocate(cls, max_bytes: int, device: torch.device) -> "_Buffer":
        memory_B = torch.empty(max_bytes, dtype=torch.uint8, device=device)
        return cls(memory_B, StreamEvent(device), StreamEvent(device))


class _Channel:
    """One direction: free buffers and sent messages."""

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self.max_bytes = max_bytes
        self.changed = threading.Condition()
        self.free = deque(_Buffer.allocate(max_bytes, device) for _ in range(NUM_BUFFERS))
        self.sent: deque[tuple[_Buffer, int]] = deque()
        self.is_closed = False


class LocalLink(Link):
    kind = "local"

    def __init__(self, outgoing: _Channel, incoming: _Channel, peer_rank: int) -> None:
        self._out, self._in, self._peer_rank = outgoing, incoming, peer_rank
        self._pending_bytes = 0

    def send_buffer(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._out.max_bytes)
        self._wait(self._out, self._out.free)
        self._pending_bytes = num_bytes
        buffer = self._out.free[0]
        buffer.read.wait()
        return buffer.memory_B[:num_bytes]

    def send(self) -> None:
        self._out.free[0].written.record()
        with self._out.changed:
            self._out.sent.append((self._out.free.popleft(), self._pending_bytes))
            self._out.changed.notify_all()
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._in.max_bytes)
        self._wait(self._in, self._in.sent)
        buffer, sent_bytes = self._in.sent[0]
        check_agreement(num_bytes, sent_bytes)
        self.bytes_received += num_bytes
        buffer.written.wait()
        return buffer.memory_B[:num_bytes]

    def release(self) -> None:
        self._in.sent[0][0].read.record()
        with self._in.changed:
            self._in.free.append(self._in.sent.popleft()[0])
            self._in.changed.notify_all()

    def close(self) -> None:
        for channel in (self._out, self._in):
            with channel.changed:
                channel.is_closed = True
                channel.changed.notify_all()

    def _wait(self, channel: _Channel, queue: "deque[_Buffer] | deque[tuple[_Buffer, int]]") -> None:
        with channel.changed:
            channel.changed.wait_for(lambda: bool(queue) or channel.is_closed)
            if not queue:
                raise ConnectionError(f"rank {self._peer_rank} closed its link.")


def local_pair(
    max_to_worker_bytes: int,
    max_to_primary_bytes: int,
    device: torch.device | str = "cpu",
    ranks: tuple[int, int] = (0, 1),
) -> tuple[LocalLink, LocalLink]:
    """(primary's end, worker's end)."""
    to_worker = _Channel(max_to_worker_bytes, torch.device(device))
    to_primary = _Channel(max_to_primary_bytes, torch.device(device))
    return LocalLink(to_worker, to_primary, ranks[1]), LocalLink(to_primary, to_worker, ranks[0])


_offered: dict[str, LocalLink] = {}  # workers' ends that have not been opened yet


def open_local(end: LinkEnd, device: torch.device) -> LocalLink:
    """Opens one end; the other one is opened by another thread of this process."""
    if end.is_primary:
        primary_end, worker_end = local_pair(*end.limits, device, end.ranks)
        name = f"{end.key}/{id(primary_end)}"
        _offered[name] = worker_end
        end.rendezvous.set(f"{end.key}/local", name.encode())
        return primary_end
    return _offered.pop(end.rendezvous.get(f"{end.key}/local", end.timeout).decode())
