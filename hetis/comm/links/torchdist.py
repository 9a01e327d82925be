"""Link over torch.distributed: NCCL between two GPUs, gloo between CPU ends.

Two groups of two ranks, one per direction: NCCL runs the operations of one group in order, and a message that waits for
the peer must not hold back the other direction. On CUDA the stream waits, never the host; a lost peer is detected by
NCCL's watchdog, which ends the process after the group's timeout.

NCCL starts an operation after all work that is queued on the current stream. A receive should not wait for that work
(on a primary: attention of its own lanes), so it is issued on an idle stream.
"""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from hetis.comm.links.base import NUM_BUFFERS, Link, LinkEnd, check_size
from hetis.comm.process_groups import lost_peer, make_process_group
from hetis.comm.streams import StreamEvent, idle_stream

NUM_CTAS = 2  # thread blocks of NCCL per direction: messages are small, and attention loses what they take


class TorchDistLink(Link):
    kind = "torchdist"

    def __init__(
        self, send_group: Any, recv_group: Any, peer_rank: int, limits: tuple[int, int], device: torch.device
    ) -> None:
        """`limits`: bytes of the largest message that this end sends and receives."""
        self._send_group, self._recv_group, self._peer_rank = send_group, recv_group, peer_rank
        self._peer = 1 - send_group.rank()
        self._out = [_buffer(limits[0], device) for _ in range(NUM_BUFFERS)]
        self._in = [_buffer(limits[1], device) for _ in range(NUM_BUFFERS)]
        self._released = [StreamEvent(device) for _ in range(NUM_BUFFERS)]  # by the reader of the last message in it
        self._device = device
        self._works: list[Any] = [None] * NUM_BUFFERS  # the last send from each buffer
        self._num_sent, self._num_received, self._pending_bytes = 0, 0, 0
        self._limits = limits

    def send_buffer(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[0])
        index = self._num_sent % NUM_BUFFERS
        if self._works[index] is not None:
            with self._lost():
                self._works[index].wait()
            self._works[index] = None
        self._pending_bytes = num_bytes
        return self._out[index][:num_bytes]

    def send(self) -> None:
        index = self._num_sent % NUM_BUFFERS
        with self._lost():
            self._works[index] = self._send_group.send([_padded(self._out[index], self._pending_bytes)], self._peer, 0)
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[1])
        index = self._num_received % NUM_BUFFERS
        buffer = self._in[index]
        with self._lost():
            with idle_stream(self._device):
                self._released[index].wait()
                work = self._recv_group.recv([_padded(buffer, num_bytes)], self._peer, 0)
            work.wait()
        self.bytes_received += num_bytes
        return buffer[:num_bytes]

    def release(self) -> None:
        self._released[self._num_received % NUM_BUFFERS].record()
        self._num_received += 1

    def connect(self, is_primary: bool, timeout: timedelta) -> None:
        """Sends a byte each way, to the worker first, in which NCCL makes the communicator of either direction."""
        for sends in (is_primary, not is_primary):
            with self._lost():
                if sends:
                    work = self._send_group.send([self._out[0][:1]], self._peer, 0)
                else:
                    work = self._recv_group.recv([self._in[0][:1]], self._peer, 0)
                work.wait(timeout)

    def close(self) -> None:
        """Waits until the peer has received what was sent, unless it has ended."""
        for work in self._works:
            try:
                if work is not None:
                    work.wait()
            except RuntimeError:
                break  # the peer has ended
        self._works = [None] * NUM_BUFFERS
        self._send_group = self._recv_group = None

    def _lost(self) -> Any:
        return lost_peer(f"rank {self._peer_rank}")


def _buffer(max_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(max(1, max_bytes), dtype=torch.uint8, device=device)


def _padded(buffer: Tensor, num_bytes: int) -> Tensor:
    """Message of at least one byte, so that empty messages stay in sequence."""
    return buffer[: max(1, num_bytes)]


def open_torchdist(end: LinkEnd, address: str, device: torch.device) -> TorchDistLink:
    """Opens one end; returns when messages have gone both ways. `address`: of this host, for gloo.

    TimeoutError, naming the rendezvous key, if the peer does not open its end; ConnectionError if it is lost.
    """
    timeout = timedelta(seconds=end.timeout)

    def join(direction: str) -> Any:
        name, index = f"{end.key}/{direction}", 0 if end.is_primary else 1
        return make_process_group(end.rendezvous, name, index, 2, device, timeout, address, num_ctas=NUM_CTAS)

    with lost_peer(f"rank {end.peer_rank}"):
        to_worker, to_primary = join("to_worker"), join("to_primary")
    send_group, recv_group = (to_worker, to_primary) if end.is_primary else (to_primary, to_worker)
    limits = (end.max_send_bytes, end.max_recv_bytes)
    link = TorchDistLink(send_group, recv_group, end.peer_rank, limits, device)
    link.connect(end.is_primary, timeout)
    return link
