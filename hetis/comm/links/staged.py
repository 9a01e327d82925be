"""The CUDA end of a link whose transport works on CPU memory.

Messages are written and read on the device; page-locked memory (the slots of the link underneath) is what both sides
copy from and to, so a message crosses the bus once and is not copied again.

    send      copy device -> host on the current stream, wait for it on the host, publish
    recv      wait for the message, copy host -> device on the current stream; the host slot is given back with
              the next message of either direction, by when that copy has long ended
"""

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hetis.comm.links.base import NUM_SLOTS, Link, check_size
from hetis.comm.streams import StreamEvent

_log = logging.getLogger(__name__)


class StagedLink(Link):
    """Device buffers in front of a CPU link."""

    def __init__(
        self,
        inner: Link,
        device: torch.device,
        max_send_bytes: int,
        max_recv_bytes: int,
        page_lock: "PageLock | None" = None,
    ) -> None:
        """Owns `inner`, and `page_lock` on its memory, from now on. A CPU `device` works as well, with plain copies."""
        self.kind = inner.kind
        self._inner, self._page_lock = inner, page_lock
        self._limits = (max_send_bytes, max_recv_bytes)
        self._out = [torch.empty(max_send_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self._in = [torch.empty(max_recv_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)]
        self._copied_out, self._copied_in = StreamEvent(device), StreamEvent(device)
        self._num_sent, self._num_received, self._pending_bytes = 0, 0, 0
        self._holds_slot = False  # of the inner link, from which the last message is being copied

    def send_buffer(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[0])
        self._pending_bytes = num_bytes
        return self._out[self._num_sent % NUM_SLOTS][:num_bytes]

    def send(self) -> None:
        self._give_back()  # before we may have to wait for the peer, who may wait for this slot
        device_B = self._out[self._num_sent % NUM_SLOTS][: self._pending_bytes]
        self._inner.send_buffer(self._pending_bytes).copy_(device_B, non_blocking=True)
        self._copied_out.record()
        self._copied_out.synchronize()
        self._inner.send()
        self._num_sent += 1
        self.bytes_sent += self._pending_bytes

    def recv(self, num_bytes: int) -> Tensor:
        check_size(num_bytes, self._limits[1])
        self._give_back()
        host_B = self._inner.recv(num_bytes)
        device_B = self._in[self._num_received % NUM_SLOTS][:num_bytes]
        device_B.copy_(host_B, non_blocking=True)
        self._copied_in.record()
        self._holds_slot = True
        self.bytes_received += num_bytes
        return device_B

    def release(self) -> None:
        """The device slot is used again two messages later, behind the reader's work on the stream."""
        self._num_received += 1

    def close(self) -> None:
        self._give_back()
        if self._page_lock is not None:
            self._page_lock.close()
        self._inner.close()

    def _give_back(self) -> None:
        if self._holds_slot:
            self._copied_in.synchronize()
            self._holds_slot = False
            self._inner.release()


class PageLock:
    """Page-locks CPU memory for fast copies; where CUDA refuses, copies are slower and nothing else changes."""

    def __init__(self, memory_B: Tensor, device: torch.device) -> None:
        self._memory_B = memory_B
        error = int(_runtime().cudaHostRegister(memory_B.data_ptr(), memory_B.numel(), 0))
        self._is_locked = error == 0
        if error != 0:
            _log.warning("CUDA does not page-lock %d bytes (error %d): copies are slower.", memory_B.numel(), error)
            _clear_last_error(device)

    def close(self) -> None:
        if self._is_locked:
            _runtime().cudaHostUnregister(self._memory_B.data_ptr())
            self._is_locked = False


def _clear_last_error(device: torch.device) -> None:
    """CUDA keeps the error until it is asked for, which torch does after its next kernel: better after this one."""
    with suppress(RuntimeError):
        torch.empty(1, device=device).fill_(0.0)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
