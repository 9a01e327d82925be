"""Links that hold no message back: `send` returns when the peer has received it. Ranks must need no more of a link."""

import queue
import threading

import torch
from torch import Tensor

from hetis.comm.links.base import Link, check_agreement, check_size
from tests.processes.look import DEADLINE


class _Channel:
    """One direction."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.messages: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self.received = threading.Semaphore(0)


class UnbufferedLink(Link):
    kind = "unbuffered"

    def __init__(self, outgoing: _Channel, incoming: _Channel) -> None:
        self._out, self._in = outgoing, incoming
        self._message: Tensor

    def send_buffer(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._out.max_bytes)
        self._message = torch.empty(num_bytes, dtype=torch.uint8)
        return self._message

    def send(self) -> None:
        self._out.messages.put(self._message)
        assert self._out.received.acquire(timeout=DEADLINE), "two ranks wait for each other"
        self.bytes_sent += len(self._message)

    def recv(self, num_bytes: int) -> Tensor:
        message = self._in.messages.get(timeout=DEADLINE)
        self._in.received.release()
        check_agreement(num_bytes, len(message))
        self.bytes_received += num_bytes
        return message

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def unbuffered_pair(
    max_to_worker_bytes: int,
    max_to_primary_bytes: int,
    device: torch.device | str = "cpu",
    ranks: tuple[int, int] = (0, 1),
) -> tuple[UnbufferedLink, UnbufferedLink]:
    """(primary's end, worker's end), in the place of `hetis.comm.links.local.local_pair`; on the CPU."""
    assert torch.device(device).type == "cpu", f"the link of ranks {ranks}"
    to_worker, to_primary = _Channel(max_to_worker_bytes), _Channel(max_to_primary_bytes)
    return UnbufferedLink(to_worker, to_primary), UnbufferedLink(to_primary, to_worker)
