"""Link over torch.distributed: NCCL between two GPUs, gloo between CPU ends.

Two groups of two ranks, one per direction: NCCL runs the operations of one group in order, and a message that waits for
the peer must not hold back the other direction. On CUDA nothing here waits on the host; the stream does. There a lost
peer is noticed by NCCL's watchdog, which ends the process after the group's timeout.

NCCL begins an operation after what the current stream has to do at that moment. A message that is received should not
wait for that (attention of the lanes at home, on a primary), so it is asked for from a stream that has nothing to do.
"""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from hetis.comm.links.base import NUM_SLOTS, Link, check_size
from hetis.comm.process_groups import lost_peer, make_process_group
from hetis.comm.rendezvous import Rendezvous
from hetis.comm.streams import StreamEvent, idle_stream

NUM_CTAS = 2  # of a direction's NCCL kernels: messages are small, and what they take is lost to attention


class TorchDistLink(Link):
    kind = "torchdist"

    def __init__(
        self, send_group: Any, recv_group: Any, peer_rank: int, limits: tuple[int, int], device: torch.device
    ) -> None:
        """`limits`: largest message this end sends and receives, bytes."""
        self._send_group, self._recv_group, self._peer_rank = send_group, recv_group, peer_rank
        self._peer = 1 - send_group.rank()
        self._out = [_buffer(limits[0], device) for _ in range(NUM_SLOTS)]
        self._in = [_buffer(limits[1], device) for _ in range(NUM_SLOTS)]
        self._released = [StreamEvent(device) for _ in range(NUM_SLOTS)]  # by the reader of the slot's last message
        self._device = device
        self._works: list[Any] = [None] * NUM_SLOTS  # the last send from each slot
        self._num_sent, self._num_received, self._pending_bytes = 0, 0, 0
        self._limits = limits

    def send_buffer(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[0])
        slot = self._num_sent % NUM_SLOTS
        if self._works[slot] is not None:
            with self._lost():
                self._works[slot].wait()
            self._works[slot] = None
        self._pending_bytes = num_bytes
        return self._out[slot][:num_bytes]

    def send(self) -> None:
        slot = self._num_sent % NUM_SLOTS
        with self._lost():
            self._works[slot] = self._send_group.send([_padded(self._out[slot], self._pending_bytes)], self._peer, 0)
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[1])
        slot = self._num_received % NUM_SLOTS
        buffer = self._in[slot]
        with self._lost():
            with idle_stream(self._device):
                self._released[slot].wait()
                work = self._recv_group.recv([_padded(buffer, num_bytes)], self._peer, 0)
            work.wait()
        self.bytes_received += num_bytes
        return buffer[:num_bytes]

    def release(self) -> None:
        self._released[self._num_received % NUM_SLOTS].record()
        self._num_received += 1

    def greet(self, is_primary: bool, timeout: timedelta) -> None:
        """A byte each way, to the worker first; what NCCL needs for either direction is there afterwards."""
        for sends in (is_primary, not is_primary):
            with self._lost():
                if sends:
                    work = self._send_group.send([self._out[0][:1]], self._peer, 0)
                else:
                    work = self._recv_group.recv([self._in[0][:1]], self._peer, 0)
                work.wait(timeout)

    def close(self) -> None:
        """Waits until the peer has taken what was sent, as far as it still lives."""
        for work in self._works:
            try:
                if work is not None:
                    work.wait()
            except RuntimeError:
                break  # it has gone, and takes no message any more
        self._works = [None] * NUM_SLOTS
        self._send_group = self._recv_group = None

    def _lost(self) -> Any:
        return lost_peer(f"rank {self._peer_rank}")


def _buffer(max_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(max(1, max_bytes), dtype=torch.uint8, device=device)


def _padded(buffer: Tensor, num_bytes: int) -> Tensor:
    """Messages without content still take a turn."""
    return buffer[: max(1, num_bytes)]


def open_torchdist(
    rendezvous: Rendezvous,
    key: str,
    *,
    address: str,
    peer_rank: int,
    is_primary: bool,
    limits: tuple[int, int],
    device: torch.device,
    timeout: float,
) -> TorchDistLink:
    """Opens this rank's end; returns when messages have gone both ways.

    `limits`: largest message to the worker and to the primary, bytes. TimeoutError, naming the rendezvous key, if the
    peer does not come within `timeout` seconds; ConnectionError if it is lost.
    """
    index, limit = 0 if is_primary else 1, timedelta(seconds=timeout)
    with lost_peer(f"rank {peer_rank}"):
        to_worker, to_primary = (
            make_process_group(rendezvous, f"{key}/{direction}", index, 2, device, limit, address, num_ctas=NUM_CTAS)
            for direction in ("to_worker", "to_primary")
        )
    if is_primary:
        link = TorchDistLink(to_worker, to_primary, peer_rank, limits, device)
    else:
        link = TorchDistLink(to_primary, to_worker, peer_rank, limits[::-1], device)
    link.greet(is_primary, limit)
    return link
